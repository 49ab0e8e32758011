"""The files of an adapter's folder."""

SPACE_CONFIG_NAME = "space_config.json"
