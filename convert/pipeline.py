"""`convert`: a checkpoint in, a text GGUF and an mmproj GGUF out."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

from qvl.convert.checkpoint import Checkpoint
from qvl.convert.config import read_config
from qvl.convert.family import conversion
from qvl.convert.hub import find_source
from qvl.convert.importance import Importance, load_importance
from qvl.convert.metadata import (
    VISION_ARCH,
    general_metadata,
    read_preprocessor,
    text_metadata,
    vision_metadata,
)
from qvl.convert.quantize import StepProgress, TensorJob, write_tensors
from qvl.convert.recipe import (
    TEXT_RECIPES,
    VISION_RECIPES,
    Choices,
    Planned,
    check_overrides,
    find_recipe,
    parse_overrides,
    parse_type,
    plan_text,
    plan_vision,
)
from qvl.convert.summary import Converted, summarize, warn
from qvl.convert.tensor_map import TensorMap, map_tensors
from qvl.convert.vocab import generation_defaults, read_vocab
from qvl.convert.writer import OutputFile, output_files
from qvl.runtime.atomic import refuse_input
from qvl.runtime.errors import InputError, check_callable, check_path, check_text, check_whole
from qvl.runtime.files import is_portable


def convert(
    src: str | Path,
    out_dir: str | Path,
    text_type: str = "q4_k_m",
    vision_type: str = "q8_0",
    imatrix: str | Path | None = None,
    progress: StepProgress | None = None,
    *,
    force: bool = False,
    threads: int | None = None,
    name: str | None = None,
    revision: str | None = None,
    tensor_types: Iterable[str] = (),
    token_embedding_type: str | None = None,
    output_type: str | None = None,
    sketch: bool = False,
) -> Converted:
    """Convert a checkpoint to `NAME-TYPE.gguf` and `mmproj-NAME-TYPE.gguf` in out_dir.

    Args:
        src: a folder with safetensors, or a hub repository id.
        text_type: a key of `TEXT_RECIPES`, any case.
        vision_type: a key of `VISION_RECIPES`, any case.
        imatrix: an importance matrix in llama.cpp's GGUF format.
        progress: called with (source bytes done, source bytes in all, tensor name).
        force: overwrite existing files.
        threads: workers; one for each logical core unless given.
        name: NAME; by default that of the folder or repository.
        revision: branch, tag or commit of a hub repository.
        tensor_types: `REGEX=TYPE` overrides by GGUF tensor name, for both files.
        token_embedding_type: type of `token_embd.weight`.
        output_type: type of the output matrix, which a tied model shares with the embedding.
        sketch: write files of the right size and header that are empty otherwise, to plan with.

    Raises:
        InputError: an unknown type, one that needs an importance matrix and has none, a name with a folder.
        GGUFError: the importance matrix is damaged.
        CheckpointError: the checkpoint is damaged, incomplete or of another architecture.
        DownloadError: the hub repository cannot be fetched.
        OutputError: a file exists, or is read here, or the disk is full.
    """
    started = time.monotonic()
    for key, path in (("src", src), ("out_dir", out_dir), ("imatrix", imatrix)):
        if path is not None or key != "imatrix":
            check_path(key, path)
    words = {"text_type": text_type, "vision_type": vision_type, "name": name, "revision": revision,
             "token_embedding_type": token_embedding_type, "output_type": output_type}  # fmt: skip
    for key, word in words.items():
        if word is not None or key in ("text_type", "vision_type"):
            check_text(key, word)
    if threads is not None:
        check_whole("threads", threads, 1, 1 << 16)
    check_callable("progress", progress)
    recipes = (
        find_recipe(text_type, TEXT_RECIPES, "text"),
        find_recipe(vision_type, VISION_RECIPES, "vision"),
    )
    choices = Choices(
        overrides=parse_overrides(tensor_types),
        embedding=None if token_embedding_type is None else parse_type(token_embedding_type),
        head=None if output_type is None else parse_type(output_type),
        calibrated=imatrix is not None,
    )
    source = find_source(src, revision=revision, bars=progress is not None)
    name = output_name(name or source.name)
    folder = Path(out_dir).expanduser()
    paths = (
        folder / f"{name}-{recipes[0].name.upper()}.gguf",
        folder / f"mmproj-{name}-{recipes[1].name.upper()}.gguf",
    )
    for path in paths:
        refuse_input(path, [*source.folder.iterdir(), *([] if imatrix is None else [Path(imatrix)])])
    config = read_config(source.folder)
    with Checkpoint(source.folder) as checkpoint:
        tensors = map_tensors(config, checkpoint)
        check_overrides(choices, (*tensors.text, *tensors.vision))
        plans = (
            plan_text(
                tensors.text,
                recipes[0],
                n_layer=config.text.num_hidden_layers,
                gqa=config.text.num_attention_heads // config.text.num_key_value_heads,
                n_expert=config.text.experts.count if config.text.experts else 0,
                choices=choices,
            ),
            plan_vision(tensors.vision, recipes[1], choices=choices),
        )
        importance = load_importance(
            imatrix, [(recipe.name, plan) for recipe, plan in zip(recipes, plans, strict=True)]
        )
        vocab = read_vocab(source.folder, config.text, conversion(config.family).CONTROL_TOKENS)
        general = general_metadata(source.folder, name, source.repo) | importance.metadata
        metadata = (
            text_metadata(
                config,
                vocab,
                generation_defaults(source.folder),
                recipes[0].file_type,
                general,
            ),
            vision_metadata(config, read_preprocessor(source.folder, config), recipes[1].file_type, general),
        )
        wanted = list(zip(paths, (config.architecture, VISION_ARCH), metadata, plans, strict=True))
        with output_files(wanted, force=force) as files:
            jobs = [
                job
                for file, plan in zip(files, plans, strict=True)
                for job in _jobs(file, plan, tensors, importance)
                if not sketch
            ]
            odd = write_tensors(checkpoint, jobs, threads=threads, progress=progress)
    files_done = tuple(summarize(path, plan) for path, plan in zip(paths, plans, strict=True))
    return Converted(
        text=paths[0],
        mmproj=paths[1],
        files=files_done,
        warnings=(*tensors.notes, *vocab.notes, *warn(odd, tensors.ignored, plans), *importance.warnings),
        seconds=time.monotonic() - started,
    )


def output_name(name: str) -> str:
    """A name that can stand in a file's.

    Raises:
        InputError: it is empty, has a folder in it, or some system cannot have a file of this name.
    """
    if not is_portable(name):
        raise InputError(f"{name!r} cannot be a file's name", hint="pass a plain name, without a folder")
    return name


def _jobs(
    file: OutputFile, plan: tuple[Planned, ...], tensors: TensorMap, importance: Importance
) -> Iterable[TensorJob]:
    for planned in plan:
        tensor = planned.tensor
        yield TensorJob(
            planned,
            tensors.entries[tensor.source],
            file,
            file.offsets[tensor.name],
            importance.values.get(tensor.name),
            importance.products.get(tensor.name),
        )
