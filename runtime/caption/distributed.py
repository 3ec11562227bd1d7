"""A run on a Ray cluster: Ray Data hands the pictures out to a pool of actors, each with a model of its own.

This process alone has the file of results open, and writes each block of records as it comes back. The block
of an actor that dies is done again by another; since a block comes back once, whole, nothing is lost and
nothing comes twice.

Pictures and model files must be reachable by the same paths on every machine, as on a shared file system.
Pictures of equal content are found here before any is handed out, so that each is captioned once.
"""

from __future__ import annotations

import importlib
import logging
from collections import defaultdict
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeAlias

from qvl.runtime.caption.assemble import readable
from qvl.runtime.caption.bookkeeping import Book, Result, Results, Stop
from qvl.runtime.caption.duplicates import first_duplicates
from qvl.runtime.caption.inputs import Item
from qvl.runtime.caption.options import CaptionOptions
from qvl.runtime.caption.prepare import content_hash
from qvl.runtime.caption.record import Record
from qvl.runtime.caption.runner import Runner
from qvl.runtime.caption.sidecar import Sidecars
from qvl.runtime.caption.stdout import JsonLines
from qvl.runtime.errors import BackendError, Cancelled, QvlError
from qvl.runtime.files import parse_json
from qvl.runtime.find import ModelFiles

BLOCK: Final = 32  # pictures that an actor takes at once; what a killed one loses at most
Copies: TypeAlias = Mapping[str, list[Item]]  # by the path of the first


@dataclass(frozen=True)
class ActorSpec:
    """Settings of an actor; they are pickled.

    Attributes:
        load_options: for `qvl.runtime.load`.
        parallel, n_ctx: of each actor; None chooses there.
    """

    text: Path
    mmproj: Path | None
    options: CaptionOptions
    load_options: Mapping[str, Any]
    parallel: int | None = None
    n_ctx: int | None = None


class Actor:
    """A model on some machine; Ray Data calls it with blocks of items."""

    def __init__(self, worker: ActorSpec) -> None:
        from qvl.runtime.caption.setup import choose_parallelism, open_captioner, plan_for
        from qvl.runtime.detail.estimator import Estimator
        from qvl.runtime.model import load

        model = load(worker.text, worker.mmproj, optimize="prefill", **worker.load_options)
        preprocessor = Estimator(model).preprocessor(worker.options.bounds)
        parallelism = choose_parallelism(
            model, worker.options, preprocessor, parallel=worker.parallel, n_ctx=worker.n_ctx, has_videos=True
        )
        self._plan = plan_for(model, [], worker.options, preprocessor)
        self._captioner = open_captioner(model, worker.options, parallelism, Stop())
        self._model = model  # it is freed with the process

    def __call__(self, block: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        """{"index", "path"} to {"index", "record"}, the records as JSON lines."""
        index_of = {str(path): int(i) for i, path in zip(block["index"], block["path"], strict=True)}
        plan = replace(self._plan, items=[Item(path) for path in index_of])
        records = list(Runner(plan, self._captioner, JsonLines()).run())
        return {
            "index": [index_of[record.path] for record in records],
            "record": [record.as_json() for record in records],
        }


class RayRunner(Book):
    """Captions on a cluster what the results do not have yet.

    Args:
        files: of the model, by paths that hold on every machine.
        address: of the cluster ("auto", "ray://HOST:10001", "HOST:6379"); None is the cluster this machine
            is in, or a new one of this machine alone.
        actors: how many; by default one for each GPU, or else for each machine.
    """

    def __init__(
        self,
        items: Sequence[Item],
        options: CaptionOptions,
        results: Results,
        files: ModelFiles,
        *,
        address: str | None = None,
        actors: int | None = None,
        load_options: Mapping[str, Any] | None = None,
        parallel: int | None = None,
        n_ctx: int | None = None,
        sidecars: Sidecars | None = None,
        block: int = BLOCK,
    ) -> None:
        super().__init__(items, results, sidecars)
        self.stop.raises = True
        self._prompts = options.prompts()  # one that cannot be used is an error here, not on every machine
        absolute = replace(
            options,
            variables=options.variables and options.variables.absolute(),
            schema=options.schema.absolute() if isinstance(options.schema, Path) else options.schema,
        )
        mmproj = files.mmproj.absolute() if files.mmproj else None
        self._worker = ActorSpec(
            files.text.absolute(), mmproj, absolute, dict(load_options or {}), parallel, n_ctx
        )
        self._address, self._actors, self._block = address, actors, block

    def run(self) -> Iterator[Record]:
        """Yield each record once it is safe on disk here.

        Raises:
            OutputError: the disk is full or fails. Cancelled: told to stop at once.
            BackendError: Ray is not installed, cannot be reached, or its actors fail.
        """
        refusals: list[Result] = []
        todo: list[Item] = []
        for item in self.todo():
            if refused := self.refused(item):
                refusals.append((item, refused))
            else:
                todo.append(item)
        yield from self.keep(refusals)
        first, copies = yield from self._part_copies(todo)
        if first and not self.stop.asked:
            ray, ours = _connect(self._address)
            try:
                for block in self._blocks(ray, first):
                    yield from self.keep(
                        [result for i, line in block for result in self._results(first[i], line, copies)]
                    )
                    if self.stop.now:
                        raise Cancelled("stopped at once; what is on disk is whole")
                    if self.stop.soon:
                        break  # blocks under way are dropped: a rerun does them
            finally:
                if ours:
                    ray.shutdown()
        self.finish()

    def _part_copies(self, todo: Sequence[Item]) -> Generator[Record, None, tuple[list[Item], Copies]]:
        """Write the records of what has a caption under another name; the rest, and the copies of it."""
        joining = self.results.mode in ("append", "prepend")
        known = [] if joining else [item for item in self.items if self._has_caption(item.path)]
        done = {item.path for item in known}
        one_at_a_time = Lock()  # reading a record moves the file's place

        def content_of(item: Item) -> str | None:
            if self.stop.soon:
                return None
            with one_at_a_time:
                record = self.results.record(item.path) if item.path in done else None
            return record.sha256 if record is not None else content_hash(item.path)

        items = [*known, *todo]
        first: list[Item] = []
        copies: Copies = defaultdict(list)
        places = first_duplicates(items, self._prompts, content_of)[len(known) :]
        for item, place in zip(todo, places, strict=True):
            duplicate = items[place]
            if duplicate.path == item.path:
                first.append(item)
            elif duplicate.path not in done:
                copies[duplicate.path].append(item)
            elif record := self.results.record(duplicate.path):
                same_as = record.same_as or record.path
                copy = replace(readable(record), path=item.path, same_as=same_as, seconds=0.0)
                yield from self.keep([(item, copy)])
        return first, copies

    def _has_caption(self, path: str) -> bool:
        return self.results.is_done(path) and self.results.failed(path) is False

    def _results(self, item: Item, line: str, copies: Copies) -> list[Result]:
        """The record of a picture, which an actor knows by its absolute path, and those of its copies."""
        record = Record.from_dict(parse_json(line))
        results: list[Result] = []
        for each in (item, *copies.get(item.path, ())):
            error = record.error and record.error.replace(record.path, each.path)
            own = self.joined(each, replace(record, path=each.path, error=error))
            if each is not item and not record.failed:
                own = replace(own, same_as=item.path, seconds=0.0)
            results.append((each, own))
        return results

    def _blocks(self, ray: Any, todo: Sequence[Item]) -> Iterator[list[tuple[int, str]]]:
        """(place in todo, record) of each block, as the blocks are done."""
        data = importlib.import_module("ray.data")
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context.execution_options.preserve_order = False
        n_gpus = int(ray.cluster_resources().get("GPU", 0))
        n_actors = self._actors or n_gpus or max(1, len(ray.nodes()))
        n_actors = min(n_actors, -(-len(todo) // self._block))
        rows = [{"index": i, "path": str(Path(item.path).absolute())} for i, item in enumerate(todo)]
        options: dict[str, Any] = {"num_gpus": 1} if n_gpus else {"num_cpus": self._cpus(ray, n_actors)}
        dataset = data.from_items(rows, override_num_blocks=-(-len(rows) // self._block)).map_batches(
            Actor,
            fn_constructor_args=(self._worker,),
            batch_size=self._block,
            compute=data.ActorPoolStrategy(size=n_actors),
            **options,
        )
        try:
            for batch in dataset.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
                yield [(int(i), str(line)) for i, line in zip(batch["index"], batch["record"], strict=True)]
        except (QvlError, GeneratorExit):
            raise
        except Exception as e:
            reason = str(e).strip().splitlines()[-1:] or [type(e).__name__]
            raise BackendError(
                f"Ray: {reason[0]}", hint="see Ray's log; run the same command again for what is left"
            ) from e

    def _cpus(self, ray: Any, n_actors: int) -> int:
        threads = self._worker.load_options.get("threads")
        share = int(ray.cluster_resources().get("CPU", 1)) // n_actors
        return max(1, int(threads) if threads else share)


def _connect(address: str | None) -> tuple[Any, bool]:
    """The module `ray`, connected; and whether the connection was made here.

    Raises:
        BackendError: it is not installed, or there is no cluster at the address.
    """
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except ImportError as e:
        raise BackendError(f"Ray is not installed: {e}", hint="pip install 'qvl[ray]'") from e
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except Exception as e:
        hint = "check the address and that `ray status` shows the cluster"
        raise BackendError(f"Ray at {address or 'this machine'}: {e}", hint=hint) from e
    return ray, True
