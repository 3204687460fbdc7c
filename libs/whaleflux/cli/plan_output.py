"""What `whaleflux plan` makes of a plan besides its report: a configuration that runs, a picture, reasons. Imports the planner when it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whaleflux.cli import output
from whaleflux.cli.output import Format

if TYPE_CHECKING:
    from whaleflux.planning.emit.planned import Emitted, Planned
    from whaleflux.planning.found import Candidate
    from whaleflux.planning.model_shape import ModelShape
    from whaleflux.planning.offers import Offer
    from whaleflux.planning.training import Training

TERMINAL = "-"  # as the picture's file
_NODE_GPUS, _TRAY_GPUS = 8, 4  # of a machine; of one whose NVLink goes beyond it (NVL72)


class Form(StrEnum):
    """Of a configuration."""

    torchrun = "torchrun"
    megatron = "megatron"
    torchtitan = "torchtitan"
    fsdp2 = "fsdp2"
    deepspeed = "deepspeed"
    job = "job"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Besides the report: a configuration, and where a picture goes (a file, or TERMINAL)."""

    emit: Form | None = None
    picture: str = ""


def picture_of(said: str, fmt: Format) -> str:
    """Raises InvalidArgument for what no picture can go to."""
    from whaleflux.errors import FieldViolation, InvalidArgument

    if said == TERMINAL and fmt.is_json:
        wrong = f"is {TERMINAL}, which draws in the terminal, and -o {fmt.value} prints no pictures; name a file, such as plan.svg"
    elif said and said != TERMINAL and Path(said).suffix.lower() != ".svg":
        wrong = (
            f"is {said[:200]!r}, and pictures are SVG; name a file that ends in .svg, or {TERMINAL} for the terminal"
        )
    else:
        return said
    raise InvalidArgument(FieldViolation("--picture", wrong))


@dataclass(frozen=True, slots=True)
class Made:
    """A plan that fits, or the one that is nearest to it, and all that it was made of; the best of all, where a format cannot express that."""

    shape: ModelShape
    offer: Offer
    plan: Candidate
    how: Training
    precision: str
    quicker: Candidate | None = None

    def emitted(self, form: Form) -> Emitted:
        """Raises InvalidArgument where the format cannot express the plan, with what to use."""
        from dataclasses import replace

        from whaleflux.planning.emit import emit

        made = emit(form.value, self._planned(self.plan))
        return replace(made, notes=(*made.notes, *self._lost(form)))

    def _planned(self, plan: Candidate) -> Planned:
        from whaleflux.planning.emit.planned import Planned
        from whaleflux.planning.machine import speed_of
        from whaleflux.planning.offers import as_known

        _, how, _ = as_known(self.offer, self.how, self.precision)
        node_gpus = _NODE_GPUS if speed_of(self.offer.gpu).nvlink_domain <= _NODE_GPUS else _TRAY_GPUS
        return Planned.of(self.shape, plan.split.plans(), how, node_gpus, self.offer.gpu.compute_capability)

    def _lost(self, form: Form) -> list[str]:
        """What it costs that the format cannot express the best plan."""
        from whaleflux.planning.emit import refused

        if self.quicker is None:
            return []
        slower = self.plan.token_s / self.quicker.token_s - 1
        why = "; ".join(refused(form.value, self._planned(self.quicker)))
        return [f"{slower:.1%} slower than {self.quicker.split.words()}, which {form.value} cannot express: {why}"]

    def why(self) -> tuple[str, ...]:
        from whaleflux.planning.offers import as_known
        from whaleflux.planning.why import reasons

        machine, how, constants = as_known(self.offer, self.how, self.precision)
        return reasons(self.shape, machine, self.plan.split, how, constants)

    def picture(self, where: str) -> list[str]:
        """Lines for the terminal, or the SVG written to the file `where` and a line about it. Raises InvalidArgument where it cannot be written."""
        from whaleflux.planning.offers import as_known
        from whaleflux.planning.pictures import Titles, as_text, svg
        from whaleflux.planning.schedule import timeline

        split = self.plan.split
        machine, how, constants = as_known(self.offer, self.how, self.precision)
        drawn = timeline(self.shape, machine, split.plans(), how, constants)
        if where == TERMINAL:
            return as_text(self.plan, drawn)
        titles = Titles(f"{self.shape.name} on {split.gpus} x {self.offer.gpu.name}", f"{split.words()}, batch {split.global_batch:,} x {split.sequence:,} tokens")  # fmt: skip
        with _writable("--picture", where):
            Path(where).write_text(svg(titles, self.plan, drawn), encoding="utf-8")
        return ["", f"picture: {where}"]

    def as_json(self, wanted: Wanted) -> dict[str, Any]:
        """What is added to the plan's."""
        more: dict[str, Any] = {"why": list(self.why())}
        if wanted.emit is not None and self.plan.fits:
            more["emitted"] = asdict(self.emitted(wanted.emit))
        if wanted.picture and wanted.picture != TERMINAL:
            self.picture(wanted.picture)
            more["picture"] = wanted.picture
        return more

    def say_emitted(self, form: Form) -> None:
        """The file to stdout, so that it can be redirected; what it cannot say to stderr."""
        made = self.emitted(form)
        output.write(made.text.encode())
        for note in made.notes:
            output.note(note)


@contextmanager
def _writable(option: str, where: str) -> Iterator[None]:
    from whaleflux.errors import FieldViolation, InvalidArgument

    try:
        yield
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or "is no path"
        raise InvalidArgument(FieldViolation(option, f"{where[:200]} cannot be written: {why}; name a file in a folder that is there")) from None  # fmt: skip
