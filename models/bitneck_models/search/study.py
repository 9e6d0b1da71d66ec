"""The study of a search: its trials, in a storage that any number of workers share."""

import warnings

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from bitneck.errors import BitneckError, InvalidConfig
from bitneck_models.search.space import SearchSpace

__all__ = ["describe", "open_study"]

_HEARTBEAT_S = 30
_SHOWN = {"S": "stride", "Cr": "channels", "lambda": "lambda", "Q": "step"}


def open_study(space: SearchSpace, storage: str, *, create: bool = True) -> optuna.Study:
    """Open the study of a space, and create it if it does not exist.

    A worker that dies leaves its trial running. Once its heartbeat is missing for a while, another worker marks the
    trial as failed, and the search continues.

    Args:
        space: gives the study's name. A study keeps the space that it was created with.
        storage: an SQLAlchemy URL.
        create: create the study if it does not exist.

    Raises:
        InvalidConfig: the storage cannot be used, has the study with another space, or does not have it.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    engine = {"connect_args": {"timeout": 60}} if storage.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # heartbeats have been so for years
            rdb = RDBStorage(storage, engine_kwargs=engine, heartbeat_interval=_HEARTBEAT_S)
        if create:
            study = optuna.create_study(
                storage=rdb,
                study_name=space.name,
                directions=["minimize", "maximize"],
                load_if_exists=True,
                sampler=optuna.samplers.TPESampler(constant_liar=True),
            )
        else:
            try:
                study = optuna.load_study(storage=rdb, study_name=space.name)
            except KeyError as exc:
                raise InvalidConfig(
                    f"{storage} has no study {space.name!r} yet; run `bitneck-models search` with this space first"
                ) from exc
        own = space.model_dump_json(by_alias=True)
        if SearchSpace.model_validate_json(study.user_attrs.get("space", own)) != space:
            raise InvalidConfig(
                f"{storage} holds the study {space.name!r} with another search space: rename it, or restore its space"
            )
        study.set_user_attr("space", own)
    except BitneckError:
        raise
    except Exception as exc:  # SQLAlchemy, its drivers and Optuna each have their own
        reason = str(exc).splitlines()[0]
        raise InvalidConfig(f"{storage}: the storage cannot be used ({type(exc).__name__}: {reason})") from exc
    return study


def describe(trial: FrozenTrial) -> str:
    """One line about a trial that has ended."""
    recipe = trial.user_attrs.get("recipe", {})
    what = ", ".join(f"{name} {recipe[key]:.4g}" for name, key in _SHOWN.items() if key in recipe)
    if trial.values is not None:
        return f"trial {trial.number}: {trial.user_attrs['bytes']:.1f} bytes, agreement {trial.values[1]:.3f} ({what})"
    return f"trial {trial.number}: {trial.state.name.lower()} {trial.user_attrs.get('failure', '')} ({what})"
