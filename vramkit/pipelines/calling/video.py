"""Frames: from the VAE's output to arrays or pictures, to an mp4 file, and pictures and clips from files."""

from __future__ import annotations

import io
import os
import subprocess
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from vramkit.errors import CheckpointError, ConfigError, StoreError
from vramkit.extras import extra
from vramkit.pipelines.calling.inputs import check_finite, plain_number
from vramkit.pipelines.loading.options import refuse_arguments

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL.Image import Image

    Pixels: TypeAlias = npt.NDArray[np.uint8]

OUTPUT_TYPES = ("np", "pt", "pil")
# Containers that carry H.264.
VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".avi")
ROUNDING = 0.01  # how far beyond 0 .. 1 a value is clipped: bfloat16 has no number between 1 and 1.0078
# What diffusers' function takes beside: here in another way.
_OTHER_SETTINGS: Mapping[str, str] = MappingProxyType(
    {
        "bitrate": "give quality, 0 to 10",
        "macro_block_size": "leave it out: frames keep their size, odd sides get one row more",
    }
)


def postprocess_video(video: torch.Tensor, output_type: str = "np") -> Any:
    """Turn decoded video into the form that a pipeline returns.

    Args:
        video: [B, C, F, H, W] in -1 .. 1, any floating dtype.
        output_type: ``"np"`` for a float32 array [B, F, H, W, C] in 0 .. 1, ``"pt"`` for a tensor [B, F, C, H, W] in
            0 .. 1 of the video's dtype and device, ``"pil"`` for a list of B lists of F pictures.

    Raises:
        ConfigError: an unknown output type.
    """
    if output_type not in OUTPUT_TYPES:
        raise ConfigError(f"output_type is {output_type!r}; expected one of {', '.join(OUTPUT_TYPES)}.")
    frames = (video.transpose(1, 2) * 0.5).add_(0.5).clamp_(0, 1)  # [B, F, C, H, W]
    if output_type == "pt":
        return frames
    array = frames.movedim(2, -1).cpu().float().numpy()  # [B, F, H, W, C]
    if output_type == "np":
        return array
    return [[_picture(_to_uint8(frame)) for frame in clip] for clip in array]


class VideoProcessor:
    """What scripts for diffusers ask ``pipeline.video_processor`` for."""

    postprocess_video = staticmethod(postprocess_video)


def export_to_video(
    frames: Iterable[Any] | npt.NDArray[Any] | torch.Tensor | None = None,
    path: str | os.PathLike[str] | None = None,
    fps: float = 16,
    quality: float = 7,
    *,
    video_frames: Iterable[Any] | None = None,
    output_video_path: str | os.PathLike[str] | None = None,
    **others: Any,
) -> str:
    """Write ``frames`` as an H.264 video and return its path.

    The file appears under its name only when it is whole: an interrupted or failed write leaves nothing behind.

    Args:
        frames: what a pipeline gives as ``.frames[0]``: an array [F, H, W, 3], a tensor [F, 3, H, W], or a sequence of
            such frames or of PIL pictures. Floating values are in 0 .. 1 (a hundredth more or less is clipped: sums in 16
            bits end there), integers are uint8.
        path: the file to write; its folder must exist. ``.mp4``, ``.mov``, ``.mkv`` or ``.avi``. By default an mp4 in a new
            temporary folder.
        fps: frames per second (the Wan checkpoints were trained at 16).
        quality: 0 (smallest file) .. 10 (best picture).
        video_frames: another name of ``frames``, that of diffusers.
        output_video_path: another name of ``path``, that of diffusers.
        **others: other arguments of diffusers' function, refused unless they are None.

    Raises:
        ConfigError: no frames, frames of a wrong form, or a path or setting that cannot be used.
        StoreError: the encoder failed, for example because the disk is full.
    """
    refuse_arguments("export_to_video", others, _OTHER_SETTINGS)
    for name, first, second in (("path", path, output_video_path), ("frames", frames, video_frames)):
        if first is not None and second is not None:
            raise ConfigError(f"export_to_video: {name} is given twice, under its two names; give it once")
    path = output_video_path if path is None else path
    if path is None:
        path = Path(tempfile.mkdtemp(prefix="vramkit-")) / "video.mp4"
    fps, quality = plain_number(fps), plain_number(quality)
    target = check_video(path, fps=fps, quality=quality)
    pictures = _pictures(video_frames if frames is None else frames)
    first = next(pictures, None)
    if first is None:
        raise ConfigError("There are no frames to write.")
    with _whole_or_absent(target) as part:
        _encode(first, pictures, part, fps=fps, quality=quality)
    return str(target)


def load_image(image: str | os.PathLike[str] | Image) -> Image:
    """Return an RGB picture from a local path, an http(s) address or a PIL picture, upright as its EXIF data says.

    Raises:
        ConfigError: the path does not exist.
        CheckpointError: the address cannot be read, or the bytes are no picture.
    """
    with extra("video", needed_for="a picture"):
        import PIL.Image  # noqa: PLC0415
        import PIL.ImageOps  # noqa: PLC0415

    if isinstance(image, PIL.Image.Image):
        picture = image
    else:
        try:
            picture = PIL.Image.open(io.BytesIO(_content(os.fspath(image), "a picture")))
            picture.load()
        except OSError as error:  # what Pillow raises for bytes that it does not know, or that end too early
            raise CheckpointError(f"{image} is not a picture that can be read: {error}") from error
    upright = PIL.ImageOps.exif_transpose(picture)
    return upright.convert("RGB")


def load_video(video: str | os.PathLike[str], convert_method: Callable[[list[Image]], Any] | None = None) -> Any:
    """Return the frames of a clip as RGB pictures, from a local path or an http(s) address.

    Args:
        video: a video that ffmpeg reads, or a GIF.
        convert_method: is given the list of pictures; what it returns is returned.

    Raises:
        ConfigError: the path does not exist.
        CheckpointError: the address cannot be read, or the bytes are no video.
    """
    with extra("video", needed_for="a video"):
        import imageio_ffmpeg  # noqa: PLC0415
        import PIL.Image  # noqa: PLC0415
        import PIL.ImageSequence  # noqa: PLC0415

    content = _content(os.fspath(video), "a video")
    if content.startswith(b"GIF8"):
        try:
            frames = [frame.convert("RGB") for frame in PIL.ImageSequence.Iterator(PIL.Image.open(io.BytesIO(content)))]
        except OSError as error:
            raise CheckpointError(f"{video} is not a video that can be read: {error}") from error
    else:
        with tempfile.TemporaryDirectory(prefix="vramkit-") as folder:
            copied = Path(folder) / "video"  # a name that ffmpeg takes for no protocol, whatever the clip is called
            copied.write_bytes(content)
            frames = _read_frames(copied, str(video), imageio_ffmpeg.get_ffmpeg_exe(), PIL.Image)
    return frames if convert_method is None else convert_method(frames)


def _read_frames(path: Path, name: str, ffmpeg: str, pillow: Any) -> list[Image]:
    """Decode a video to pictures in the PPM format, one behind the other: a header with the size, then the pixels."""
    command = [ffmpeg, "-v", "error", "-i", str(path), "-f", "image2pipe", "-c:v", "ppm", "-"]
    decoder = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True)
    if decoder.returncode != 0 or not decoder.stdout:
        reason = decoder.stderr.decode(errors="replace").strip().replace("\n", "; ").replace(str(path), name)
        raise CheckpointError(f"{name} is not a video that can be read: {reason or 'it has no frames'}")
    stream, frames = io.BytesIO(decoder.stdout), []
    while stream.readline() == b"P6\n":
        width, height = (int(side) for side in stream.readline().split())
        stream.readline()  # the largest value, 255
        frames.append(pillow.frombytes("RGB", (width, height), stream.read(width * height * 3)))
    return frames


def _content(name: str, what: str) -> bytes:
    if name.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(name, timeout=30) as answer:
                content: bytes = answer.read()
                return content
        except (urllib.error.URLError, TimeoutError, ValueError) as error:
            raise CheckpointError(f"Cannot read {name}: {error}") from error
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"{name} does not exist: give the path or http(s) address of {what}.")
    return path.read_bytes()


def check_video(path: str | os.PathLike[str], *, fps: float = 16, quality: float = 7) -> Path:
    """Return ``path`` if a video can be written there with these settings; ConfigError if not.

    For callers that work for minutes before there is something to write.
    """
    fps, quality = plain_number(fps), plain_number(quality)
    check_finite(fps=fps, quality=quality)
    if not fps > 0:
        raise ConfigError(f"fps is {fps}; expected a positive number of frames per second.")
    if not 0 <= quality <= 10:
        raise ConfigError(f"quality is {quality}; expected 0 (smallest file) to 10 (best picture).")
    target = Path(path).expanduser()
    if target.suffix.lower() not in VIDEO_SUFFIXES:
        raise ConfigError(f"{target} does not name a video: its ending must be one of {', '.join(VIDEO_SUFFIXES)}.")
    try:
        target.lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # too long, or with a null character
        raise ConfigError(f"{target} cannot be the name of a file: {error}.") from error
    if target.is_dir():
        raise ConfigError(f"{target} is a folder: give the name of the file to write.")
    if not target.parent.is_dir():
        raise ConfigError(f"The folder {target.parent} does not exist: create it or write the video elsewhere.")
    try:  # permissions do not tell: the disk may be full or read-only
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise ConfigError(
            f"The folder {target.parent} cannot be written to ({error.strerror or error}): write the video elsewhere."
        ) from error
    return target


@contextmanager
def _whole_or_absent(target: Path) -> Iterator[Path]:
    """Give a temporary name beside ``target``; rename it on success, remove it on any failure, Ctrl-C included."""
    part = target.with_name(f".{uuid.uuid4().hex}.part{target.suffix}")  # a long name has room for no more letters
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _encode(first: Pixels, rest: Iterator[Pixels], part: Path, *, fps: float, quality: float) -> None:
    """Pipe RGB frames of one size into ffmpeg. Run here rather than by a helper so that its exit status is seen."""
    height, width, _ = first.shape
    command = _ffmpeg_command(part, width=width, height=height, fps=fps, quality=quality)
    with tempfile.TemporaryFile() as log:
        # A session of its own: Ctrl-C must reach us and not the encoder, which would end its file as if it were whole.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, start_new_session=True) as encoder:
            stdin = encoder.stdin
            assert stdin is not None
            try:
                # An encoder that gave up closes its end: its exit status and log say why.
                with suppress(BrokenPipeError):
                    _feed(stdin, first, rest)
            except BaseException:
                encoder.kill()
                raise
            finally:
                with suppress(BrokenPipeError):
                    stdin.close()
        if encoder.returncode != 0 or not part.is_file():
            log.seek(0)
            reason = log.read().decode(errors="replace").strip().replace("\n", "; ")
            raise StoreError(f"The video encoder failed (exit status {encoder.returncode}): {reason or 'no reason'}")


def _feed(stdin: IO[bytes], first: Pixels, rest: Iterator[Pixels]) -> None:
    stdin.write(first.tobytes())
    for index, frame in enumerate(rest, start=1):
        if frame.shape != first.shape:
            raise ConfigError(f"Frame {index} has shape {frame.shape}, frame 0 has {first.shape}: use one size.")
        stdin.write(frame.tobytes())


def _ffmpeg_command(part: Path, *, width: int, height: int, fps: float, quality: float) -> list[str]:
    with extra("video", needed_for="a video file"):
        import imageio_ffmpeg  # noqa: PLC0415

    rate = str(Fraction(float(fps)).limit_denominator(1001))  # 24000/1001 stays exact
    raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", rate, "-i", "-"]
    # 4:2:0 colour is what every player reads; it wants even sides.
    picture = ["-pix_fmt", "yuv420p", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2"]
    crf = str(round(51 - 5 * quality))  # x264's scale: 51 is worst; 0 is lossless in a profile that few players read
    codec = ["-an", "-c:v", "libx264", "-crf", crf, "-movflags", "+faststart"]
    # The encoder takes what stands before a colon for a protocol, unless the name begins with a slash.
    name = str(part.absolute())
    return [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *raw, *picture, *codec, name]


def _pictures(frames: Iterable[Any] | npt.NDArray[Any] | torch.Tensor | None) -> Iterator[Pixels]:
    """Yield each frame as uint8 [H, W, 3], one at a time: a clip is not copied whole."""
    if not isinstance(frames, Iterable):
        raise ConfigError(f"frames is a {type(frames).__name__}; expected an array, a tensor, or a sequence of frames.")
    for index, frame in enumerate(frames):
        pixels = _as_array(frame)
        if pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise ConfigError(
                f"Frame {index} has shape {pixels.shape}; expected [H, W, 3] for arrays and pictures or [3, H, W] for "
                "tensors. Pass one clip: the pipeline's .frames[0], not .frames."
            )
        yield _to_uint8(pixels, index)


def _as_array(frame: Any) -> npt.NDArray[Any]:
    """Return one frame with its channels last."""
    if not isinstance(frame, torch.Tensor):
        is_picture = hasattr(frame, "convert") and hasattr(frame, "getbands")
        return np.asarray(frame.convert("RGB") if is_picture else frame)  # grey ones and those with a palette too
    frame = frame.detach().cpu()
    if frame.is_floating_point():
        frame = frame.float()  # numpy has no bfloat16
    array: npt.NDArray[Any] = (frame.movedim(0, -1) if frame.ndim == 3 else frame).numpy()
    return array


def _to_uint8(pixels: npt.NDArray[Any], index: int = 0) -> Pixels:
    if pixels.dtype == np.uint8:
        return pixels
    if not np.issubdtype(pixels.dtype, np.floating):
        raise ConfigError(f"Frame {index} is {pixels.dtype}; expected uint8, or floating values in 0 .. 1.")
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # written so that NaN fails too
        raise ConfigError(f"Frame {index} has values from {low:.9g} to {high:.9g}; expected floating values in 0 .. 1.")
    rounded: Pixels = (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    return rounded


def _picture(pixels: Pixels) -> Image:
    with extra("video", needed_for="a picture"):
        import PIL.Image  # noqa: PLC0415

    return PIL.Image.fromarray(pixels)
