"""Write tests/fixtures/golden/vision_*.npz from the references, so that the tests need none of them.

    python make_vision_golden.py images   # transformers 5: Qwen2VLImageProcessorPil
    python make_vision_golden.py videos   # transformers 4.57, the last to take videos by Pillow
    python make_vision_golden.py frames   # qwen-vl-utils 0.0.14 and torch; torchvision is stubbed

They want different environments: `pip install torch==2.13.0 transformers==5.23.0 pillow` for images,
`pip install transformers==4.57.6 pillow` for videos, and for frames torch, requests, packaging and
`pip install --no-deps qwen-vl-utils==0.0.14`.

Small results are kept whole, of large ones a sample at fixed places; see `sample`.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.patterns import pattern

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"

# height, width, min_pixels, max_pixels
IMAGES = [
    (28, 28, 784, 12845056),
    (28, 28, 3136, 12845056),
    (1, 1, 3136, 12845056),
    (56, 84, 3136, 12845056),
    (57, 83, 3136, 12845056),
    (200, 1, 3136, 12845056),
    (2, 400, 3136, 12845056),
    (13, 57, 3136, 12845056),
    (70, 70, 3136, 12845056),  # 2.5 tokens a side: rounds half to even
    (98, 42, 3136, 12845056),
    (333, 1000, 3136, 50176),
    (480, 640, 3136, 12845056),
    (640, 480, 3136, 100352),
    (1080, 1920, 3136, 1003520),
    (90, 120, 401408, 12845056),  # enlarged
    (1500, 60, 3136, 12845056),
]

# frames, height, width, min_pixels, max_pixels
VIDEOS = [
    (1, 56, 56, 3136, 12845056),
    (2, 57, 83, 3136, 12845056),
    (3, 60, 100, 3136, 12845056),
    (4, 28, 140, 784, 12845056),
    (5, 120, 90, 3136, 6272),
    (6, 240, 320, 100352, 602112),
    (7, 48, 64, 3136, 12845056),
]


def sample(values: NDArray[Any]) -> NDArray[Any]:
    """All of a small array, of a large one about 3000 values: one in every so many, an odd step apart."""
    flat = values.reshape(-1)
    return flat if flat.size <= 40_000 else flat[:: flat.size // 3000 | 1]


def video_frames(n: int, height: int, width: int) -> NDArray[np.uint8]:
    """The frames of the golden videos, uint8 [n, height, width, 3]."""
    return np.stack([pattern(height, width, seed) for seed in range(n)])


def images() -> dict[str, NDArray[Any]]:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
        smart_resize,
    )

    out: dict[str, NDArray[Any]] = {"cases": np.array(IMAGES, np.int64)}
    for i, (height, width, low, high) in enumerate(IMAGES):
        processor = Qwen2VLImageProcessorPil(min_pixels=low, max_pixels=high)
        picture = pattern(height, width, i)
        result = processor(images=[picture], return_tensors="np", input_data_format="channels_last")
        out[f"grid_{i}"] = result["image_grid_thw"][0]
        out[f"values_{i}"] = sample(result["pixel_values"])
    sides = [*range(1, 120, 3), 140, 196, 224, 333, 480, 601, 720, 1024, 1080, 1920, 2160, 4000, 8000]
    sizes = []
    for low, high in ((3136, 12845056), (784, 1003520), (100352, 602112), (1003520, 1003520)):
        for height in sides:
            for width in sides:
                if max(height, width) / min(height, width) <= 200:
                    sizes.append((height, width, low, high, *smart_resize(height, width, 28, low, high)))
    out["sizes"] = np.array(sizes, np.int32)
    return out


def videos() -> dict[str, NDArray[Any]]:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

    out: dict[str, NDArray[Any]] = {"cases": np.array(VIDEOS, np.int64)}
    for i, (n, height, width, low, high) in enumerate(VIDEOS):
        processor = Qwen2VLImageProcessor(min_pixels=low, max_pixels=high)
        frames = list(video_frames(n, height, width))
        result = processor(images=None, videos=[frames], return_tensors="np")
        out[f"grid_{i}"] = result["video_grid_thw"][0]
        out[f"values_{i}"] = sample(result["pixel_values_videos"])
    return out


def frames() -> dict[str, NDArray[Any]]:
    import torch

    sizes: list[tuple[int, int]] = []

    def resize(video: Any, size: list[int], **_: Any) -> Any:
        sizes.append((size[0], size[1]))
        return video

    functional = types.SimpleNamespace(resize=resize)
    torchvision: Any = types.ModuleType("torchvision")
    torchvision.__version__ = "0.27"
    torchvision.io = types.ModuleType("torchvision.io")
    torchvision.transforms = types.ModuleType("torchvision.transforms")
    torchvision.transforms.functional = functional
    torchvision.transforms.InterpolationMode = types.SimpleNamespace(BICUBIC="bicubic")
    sys.modules |= {
        "torchvision": torchvision,
        "torchvision.io": torchvision.io,
        "torchvision.transforms": torchvision.transforms,
    }
    from qwen_vl_utils import vision_process

    indices: list[list[int]] = []
    shape = (0, 0.0, 0, 0)

    def read(ele: dict[str, Any]) -> tuple[Any, dict[str, Any], float]:
        total, fps, height, width = shape
        count = vision_process.smart_nframes(ele, total_frames=total, video_fps=fps)
        indices.append(torch.linspace(0, total - 1, count).round().long().tolist())
        return torch.empty(1).expand(count, 3, height, width), {}, fps

    vision_process.VIDEO_READER_BACKENDS = {"torchvision": read}
    vision_process.FORCE_QWENVL_VIDEO_READER = "torchvision"
    cases: list[tuple[float, ...]] = []
    chosen: list[list[int]] = []
    budgets: list[tuple[int, int]] = []
    for total in (2, 3, 4, 5, 7, 10, 29, 30, 31, 60, 97, 100, 250, 301, 999, 1800, 5003, 20000, 107892):
        for fps in (5.0, 23.976, 25.0, 29.97, 60.0):
            for options in ({}, {"fps": 1.0}, {"fps": 4.0, "max_frames": 64}, {"min_frames": 10}):
                if total < options.get("min_frames", 0) or (options and total > 6000):
                    continue
                height, width = ((240, 320), (1080, 1920), (720, 405))[len(cases) % 3]
                shape = (total, fps, height, width)
                vision_process.fetch_video({"video": "stub", "total_pixels": 24576 * 28 * 28, **options})
                cases.append((total, fps, options.get("fps", 2.0), options.get("min_frames", 4),
                              options.get("max_frames", 768), height, width))  # fmt: skip
                chosen.append(indices[-1])
                budgets.append(sizes[-1])
    return {
        "cases": np.array(cases, np.float64),
        "counts": np.array([len(c) for c in chosen], np.int32),
        "indices": np.concatenate(chosen).astype(np.int32),
        "sizes": np.array(budgets, np.int32),
    }


if __name__ == "__main__":
    parts = {"images": images, "videos": videos, "frames": frames}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        sys.exit(__doc__)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    target = GOLDEN / f"vision_{sys.argv[1]}.npz"
    np.savez_compressed(target, **parts[sys.argv[1]]())  # type: ignore[arg-type]
    print(target, target.stat().st_size, "bytes")
