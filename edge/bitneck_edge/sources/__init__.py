"""Where pictures come from: files, folders, videos, network streams and cameras."""
