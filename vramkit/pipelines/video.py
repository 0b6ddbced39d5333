"""The calls for frames and videos, under the address that scripts import them from."""

from vramkit.pipelines.calling.video import (
    OUTPUT_TYPES,
    VideoProcessor,
    check_video,
    export_to_video,
    load_image,
    load_video,
    postprocess_video,
)

__all__ = [
    "OUTPUT_TYPES",
    "VideoProcessor",
    "check_video",
    "export_to_video",
    "load_image",
    "load_video",
    "postprocess_video",
]
