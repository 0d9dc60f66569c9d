"""The web page and its API: needs the extra `web`."""
