"""From the recipe to the image source that it names."""

import itertools
from pathlib import Path

from cluster.errors import DataError
from cluster.location import Location
from jobs.data.config import DataConfig
from jobs.data.sources.contract import Source
from jobs.data.sources.folder import MISSING, FolderSource
from jobs.data.sources.sample import open_sample
from jobs.data.sources.shards import first_location, format_of_name

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
PEEKED_FILES = 64
"""Files of a folder whose names are looked at to tell what it is."""


def open_source(config: DataConfig, storage: Path) -> Source:
    """The source that `data.source` names; samples are rendered below `storage`. Raises DataError.

    Looks at names at most: whether the source can be used, its `check` says.
    """
    reference = config.source
    if not reference:
        raise DataError("data.source is not given: name a folder of class folders, as data.source=photos/")
    if reference.startswith("sample:"):
        return open_sample(reference.removeprefix("sample:"), storage)
    if reference.startswith("ray:"):
        from jobs.data.sources.function import FunctionSource

        return FunctionSource(reference.removeprefix("ray:"), config)
    format = config.format if config.format != "auto" else _tell_format(reference, config)
    if format == "folder":
        return FolderSource(Location.parse(reference))
    if format == "manifest":
        from jobs.data.sources.manifest import ManifestSource

        return ManifestSource(Location.parse(reference), config)
    if format == "tfrecord":
        from jobs.data.sources.tfrecord import TFRecordSource

        return TFRecordSource(reference, config)
    if format == "webdataset":
        from jobs.data.sources.webdataset import WebDatasetSource

        return WebDatasetSource(reference, config)
    from jobs.data.sources.parquet import ParquetSource

    return ParquetSource(reference, config)


def _tell_format(reference: str, config: DataConfig) -> str:
    location = first_location(reference)
    format = format_of_name(location.name)
    if format == "parquet" and reference == str(location) and _lists_paths(location, config):
        return "manifest"
    if format is not None:
        return format
    if location.is_web:
        raise DataError(f"data.format must be given: {location} does not tell what it is by its name")
    info = location.info()
    if info is None:
        raise DataError(MISSING.format(str(location)))
    if not info.is_folder:
        raise DataError(
            f"data.source {str(location)!r} is a file of no known kind (*.csv, *.jsonl, *.parquet, *.tar, *.tfrecord): "
            "give data.format, or name a folder of class folders"
        )
    names = [name.lower() for name, _ in itertools.islice(location.walk(), PEEKED_FILES)]
    if any(name.endswith(IMAGE_SUFFIXES) for name in names):
        return "folder"
    told = [format_of_name(name) for name in names]
    return next((one for one in told if one in ("webdataset", "parquet", "tfrecord")), "folder")


def _lists_paths(location: Location, config: DataConfig) -> bool:
    """Whether a Parquet file names images rather than to hold them."""
    from jobs.data.sources.columns import IMAGE_NAMES, PATH_NAMES, find_columns
    from jobs.data.sources.parquet import holds_images, parquet_schema

    info = location.info()
    if info is None or info.is_folder:
        return False
    schema = parquet_schema(location)
    column = find_columns(schema.names, config, str(location), (*IMAGE_NAMES, *PATH_NAMES)).image
    return not holds_images(schema.field(column).type)
