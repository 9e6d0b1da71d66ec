// Ask again and again, never twice at a time, and not while nobody looks.

export function poll(seconds, ask, complain) {
  const ending = new AbortController();
  let timer = 0;
  async function once() {
    if (!document.hidden) {
      try {
        await ask(ending.signal);
      } catch (error) {
        if (ending.signal.aborted) return;
        complain(error);
      }
    }
    if (!ending.signal.aborted) timer = setTimeout(once, 1000 * seconds);
  }
  once();
  return () => {
    ending.abort();
    clearTimeout(timer);
  };
}
