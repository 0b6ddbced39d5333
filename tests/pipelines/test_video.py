from __future__ import annotations

import errno
import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import PIL.Image
import pytest
import torch

from vramkit.errors import CheckpointError, ConfigError, StoreError
from vramkit.pipelines.calling.video import check_video, export_to_video, load_image, load_video, postprocess_video

HEIGHT, WIDTH, COUNT = 32, 48, 7


@pytest.fixture
def clip() -> np.ndarray:
    """A moving gradient [F, H, W, 3] in 0 .. 1."""
    rows = np.linspace(0, 1, HEIGHT)[:, None] * np.ones((1, WIDTH))
    frames = [np.stack([np.roll(rows, 3 * i, 0), rows, 1 - rows], -1) for i in range(COUNT)]
    return np.stack(frames).astype(np.float32)


def read_video(path: str | Path) -> tuple[np.ndarray, str]:
    """Return the frames [F, H, W, 3] of a video and what the decoder says about its stream."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    (stream,) = [line for line in done.stderr.decode().splitlines() if "Video: h264" in line]
    width, height = map(int, re.search(r", (\d{2,})x(\d{2,})", stream).groups())
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, height, width, 3), stream


class TestPostprocess:
    @pytest.fixture
    def video(self) -> torch.Tensor:
        return torch.randn(2, 3, 5, 8, 12, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_diffusers(self, video: torch.Tensor, output_type: str, dtype: torch.dtype) -> None:
        from diffusers.video_processor import VideoProcessor

        ours = postprocess_video(video.to(dtype), output_type)
        oracle = VideoProcessor(vae_scale_factor=8).postprocess_video(video.to(dtype), output_type)
        if output_type == "pil":
            assert [[frame.tobytes() for frame in clip] for clip in ours] == [
                [frame.tobytes() for frame in clip] for clip in oracle
            ]
            assert [len(clip) for clip in ours] == [5, 5]
        else:
            assert ours.dtype == oracle.dtype
            assert ours.shape == oracle.shape
            np.testing.assert_array_equal(np.asarray(torch.as_tensor(ours).float()), torch.as_tensor(oracle).float())

    def test_leaves_its_input_alone(self, video: torch.Tensor) -> None:
        before = video.clone()
        postprocess_video(video, "np")
        assert torch.equal(video, before)

    def test_unknown_type(self, video: torch.Tensor) -> None:
        with pytest.raises(ConfigError, match=r"'jpg'.*np, pt, pil"):
            postprocess_video(video, "jpg")


class TestExport:
    def forms(self, clip: np.ndarray) -> dict[str, Any]:
        bytes_ = (clip * 255).round().astype(np.uint8)
        channels_first = torch.from_numpy(clip).permute(0, 3, 1, 2)
        return {
            "float array": clip,
            "double array": clip.astype(np.float64),
            "uint8 array": bytes_,
            "list of arrays": list(clip),
            "tensor": channels_first,
            "uint8 tensor": torch.from_numpy(bytes_).permute(0, 3, 1, 2),
            "list of tensors": list(channels_first),
            "pictures": [PIL.Image.fromarray(frame) for frame in bytes_],
        }

    def test_every_form_of_frames_gives_the_same_file(self, clip: np.ndarray, tmp_path: Path) -> None:
        files = [Path(export_to_video(form, tmp_path / f"{i}.mp4")) for i, form in enumerate(self.forms(clip).values())]
        assert len({file.read_bytes() for file in files}) == 1

    def test_what_is_written_can_be_read_back(self, clip: np.ndarray, tmp_path: Path) -> None:
        path = export_to_video(clip, str(tmp_path / "clip.mp4"), fps=12, quality=9)
        frames, stream = read_video(path)
        assert frames.shape == (COUNT, HEIGHT, WIDTH, 3)
        assert " 12 fps" in stream
        assert np.abs(frames / 255 - clip).mean() < 0.03

    def test_more_quality_is_a_larger_file(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).random((COUNT, HEIGHT, WIDTH, 3))
        low, high = (Path(export_to_video(noise, tmp_path / f"{q}.mp4", quality=q)).stat().st_size for q in (1, 9))
        assert high > 2 * low

    def test_odd_sizes_and_single_frames(self, clip: np.ndarray, tmp_path: Path) -> None:
        frames, _ = read_video(export_to_video(clip[:1, :31, :47], tmp_path / "odd.mp4"))
        assert frames.shape == (1, 32, 48, 3)

    @pytest.mark.parametrize("name", ["2025-11-25T21:24.mp4", "-y.mp4", "a b%03d'[x].mp4", f"{'x' * 250}.mp4"])
    def test_any_name_relative_or_not(
        self, name: str, clip: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert export_to_video(clip[:1], name) == name
        before = (tmp_path / name).read_bytes()
        export_to_video(clip[:1], tmp_path / name)
        assert (tmp_path / name).read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == [name]

    def test_arguments_as_scripts_for_diffusers_give_them(self, clip: np.ndarray, tmp_path: Path) -> None:
        written = [
            export_to_video(clip, tmp_path / "a.mp4", 12),
            export_to_video(clip, output_video_path=str(tmp_path / "b.mp4"), fps=np.float32(12), quality=np.int64(7)),
            export_to_video(video_frames=iter(clip), output_video_path=tmp_path / "c.mp4", fps=torch.tensor(12.0)),
            export_to_video(clip, fps=12),  # where temporary files are
        ]
        assert len({Path(path).read_bytes() for path in written}) == 1
        shutil.rmtree(Path(written[-1]).parent)
        for others, message in (
            ({"bitrate": 10}, "give quality"),
            ({"macro_block_size": 8}, "leave it out"),
            ({"nonsense": 1}, "no argument 'nonsense'"),
            ({"output_video_path": "x.mp4"}, "path is given twice"),
        ):
            with pytest.raises(ConfigError, match=message):
                export_to_video(clip, tmp_path / "d.mp4", **others)

    def test_values_a_rounding_beyond_their_range_are_clipped(self, clip: np.ndarray, tmp_path: Path) -> None:
        whole = (clip > 0.5).astype(np.float32)
        plain = Path(export_to_video(whole, tmp_path / "a.mp4")).read_bytes()
        for beyond in (whole * np.float32(1.0000001), whole * np.float32(1.0078125) - np.float32(1e-7)):
            assert Path(export_to_video(beyond, tmp_path / "b.mp4")).read_bytes() == plain
        with pytest.raises(ConfigError, match=r"from 0 to 1\.0199"):
            export_to_video(whole * np.float32(1.02), tmp_path / "c.mp4")

    def test_pictures_of_other_modes(self, clip: np.ndarray, tmp_path: Path) -> None:
        grey = PIL.Image.fromarray((clip[0, ..., 0] * 255).round().astype(np.uint8))
        files = [Path(export_to_video([grey.convert(mode)], tmp_path / f"{mode}.mp4")) for mode in ("L", "RGB", "RGBA")]
        assert len({file.read_bytes() for file in files}) == 1

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda clip: None, "NoneType"),
            (lambda clip: clip[:0], "no frames"),
            (lambda clip: clip[None], r"\.frames\[0\]"),
            (lambda clip: clip[..., 0], r"shape \(32, 48\)"),
            (lambda clip: clip[..., :1], "shape"),
            (lambda clip: clip * 255, "0 .. 1"),
            (lambda clip: clip - 0.5, "0 .. 1"),
            (lambda clip: clip * np.nan, "0 .. 1"),
            (lambda clip: (clip * 255).astype(np.int64), "int64"),
            (lambda clip: clip > 0.5, "bool"),
            (lambda clip: [*clip, clip[0, :16]], "shape"),
        ],
    )
    def test_wrong_frames_are_a_clear_error_and_no_file(
        self, spoil: Any, message: str, clip: np.ndarray, tmp_path: Path
    ):
        with pytest.raises(ConfigError, match=message):
            export_to_video(spoil(clip), tmp_path / "clip.mp4")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("missing/clip.mp4", {}, "missing does not exist"),
            ("clip.txt", {}, r"\.mp4"),
            ("clip", {}, r"\.mp4"),
            ("folder.mp4", {}, "is a folder"),
            ("clip.mp4", {"fps": 0}, "fps"),
            ("clip.mp4", {"fps": float("nan")}, "fps"),
            ("clip.mp4", {"fps": "16"}, "fps"),
            ("clip.mp4", {"quality": 11}, "quality"),
            (f"{'x' * 255}.mp4", {}, "cannot be the name of a file"),
            ("a\0.mp4", {}, "cannot be the name of a file"),
        ],
    )
    def test_wrong_settings(self, name: str, options: dict[str, Any], message: str, clip: np.ndarray, tmp_path: Path):
        (tmp_path / "folder.mp4").mkdir()
        with pytest.raises(ConfigError, match=message):
            export_to_video(clip, tmp_path / name, **options)

    def test_a_folder_that_takes_no_file_is_found_before_there_is_a_video(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        assert check_video(tmp_path / "clip.mp4") == tmp_path / "clip.mp4"
        assert list(tmp_path.iterdir()) == []

        def refuse(*_args: Any, **_options: Any) -> None:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        monkeypatch.setattr("vramkit.pipelines.calling.video.tempfile.TemporaryFile", refuse)
        with pytest.raises(
            ConfigError, match=r"cannot be written to \(Disk quota exceeded\): write the video elsewhere"
        ):
            check_video(tmp_path / "clip.mp4")

    def test_interrupted_write_keeps_the_old_file_and_leaves_nothing(self, clip: np.ndarray, tmp_path: Path) -> None:
        target = tmp_path / "clip.mp4"
        export_to_video(clip, target)
        before = target.read_bytes()

        class Interrupted(list[Any]):
            def __iter__(self) -> Iterator[Any]:
                yield from clip[:3]
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            export_to_video(Interrupted(clip), target)
        assert target.read_bytes() == before
        assert list(tmp_path.iterdir()) == [target]

    def test_failing_encoder_is_a_clear_error(
        self, clip: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = tmp_path / "encoder"
        script.write_text("#!/bin/sh\necho no space left >&2\nexit 3\n")
        script.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(script))
        big = np.repeat(np.repeat(clip, 8, axis=1), 8, axis=2)  # more than a pipe holds, so that writing fails too
        with pytest.raises(StoreError, match=r"status 3.*no space left"):
            export_to_video(big, tmp_path / "clip.mp4")
        assert list(tmp_path.iterdir()) == [script]


class TestLoadImage:
    @pytest.fixture
    def picture(self) -> PIL.Image.Image:
        return PIL.Image.fromarray((np.random.default_rng(0).random((6, 9, 3)) * 255).astype(np.uint8))

    def test_from_path_and_picture(self, picture: PIL.Image.Image, tmp_path: Path) -> None:
        path = tmp_path / "picture.png"
        picture.save(path)
        assert load_image(path).tobytes() == picture.tobytes()
        assert load_image(str(path)).tobytes() == picture.tobytes()
        assert load_image(picture.convert("RGBA")).mode == "RGB"

    def test_is_turned_upright(self, picture: PIL.Image.Image, tmp_path: Path) -> None:
        exif = PIL.Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter
        picture.save(tmp_path / "picture.png", exif=exif)
        assert load_image(tmp_path / "picture.png").size == (6, 9)

    def test_from_an_address(self, picture: PIL.Image.Image, tmp_path: Path) -> None:
        picture.save(tmp_path / "picture.png")
        content = (tmp_path / "picture.png").read_bytes()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200 if self.path == "/picture.png" else 404)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: object) -> None:
                pass

        with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            address = f"http://127.0.0.1:{server.server_port}"
            try:
                assert load_image(f"{address}/picture.png").tobytes() == picture.tobytes()
                with pytest.raises(CheckpointError, match="404"):
                    load_image(f"{address}/other.png")
            finally:
                server.shutdown()
                thread.join()

    def test_what_is_no_picture(self, tmp_path: Path) -> None:
        (tmp_path / "text.png").write_text("not a picture")
        with pytest.raises(CheckpointError, match=r"text\.png is not a picture"):
            load_image(tmp_path / "text.png")
        with pytest.raises(ConfigError, match="does not exist"):
            load_image(tmp_path / "missing.png")


class TestLoadVideo:
    @pytest.fixture
    def frames(self) -> Any:
        coarse = np.random.default_rng(0).random((9, 4, 6, 3))
        return coarse.repeat(8, axis=1).repeat(8, axis=2)

    def test_frames_of_an_exported_clip(self, frames: Any, tmp_path: Path) -> None:
        path = export_to_video(frames, tmp_path / "a: clip.mp4", fps=16)
        got = load_video(path)
        assert [picture.size for picture in got] == [(48, 32)] * 9
        raw = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
        assert (
            b"".join(picture.tobytes() for picture in got)
            == subprocess.run(raw, check=True, capture_output=True).stdout
        )
        assert np.abs(np.stack(got) / 255 - frames).mean() < 0.1

    def test_pictures_of_a_gif(self, frames: Any, tmp_path: Path) -> None:
        first, *rest = [PIL.Image.fromarray((frame * 255).astype(np.uint8)) for frame in frames]
        first.save(tmp_path / "clip.gif", save_all=True, append_images=rest)
        got = load_video(tmp_path / "clip.gif")
        assert [picture.mode for picture in got] == ["RGB"] * 9
        assert [picture.tobytes() for picture in got] == [picture.tobytes() for picture in (first, *rest)]

    def test_what_converts_is_given_the_pictures(self, frames: Any, tmp_path: Path) -> None:
        path = export_to_video(frames, tmp_path / "clip.mp4")
        assert load_video(path, lambda pictures: pictures[::2][:3])[0].size == (48, 32)
        assert len(load_video(path, convert_method=lambda pictures: pictures[::2])) == 5

    def test_what_is_no_video(self, tmp_path: Path) -> None:
        for name, content in (("text.mp4", b"no video"), ("short.gif", b"GIF89a"), ("empty.mp4", b"")):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(CheckpointError, match=rf"{name} is not a video"):
                load_video(tmp_path / name)
        with pytest.raises(ConfigError, match="does not exist: give the path or http\\(s\\) address of a video"):
            load_video(tmp_path / "missing.mp4")
