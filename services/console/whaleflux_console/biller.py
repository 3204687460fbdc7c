"""Bills hours without keeping others waiting: a large one in a process of its own, python -m whaleflux_console.biller FOLDER.

Billing is Python that holds its lock, for seconds where there are ten thousand cards; meanwhile nobody would be answered. The process gets
Arrow files in a folder and leaves one there. Its memory is the machine's again when the hour is billed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from whaleflux.errors import Unavailable
from whaleflux_console.core.price_book import price_from
from whaleflux_console.ledger import schemas
from whaleflux_console.ledger.billing import Billed, Known, billed

LARGE_ROWS = 5_000  # 200 cards or so; what takes a thread a fifth of a second is not worth a process
LONGEST_S = 600.0
_NICE = 5  # answers come first
_ASKED, _FOUND, _ROWS = "asked.json", "found.json", "rows.arrow"


class NotBilled(Unavailable):
    """The process ended before it was done."""


async def bill(known: Known, scratch: Path) -> Billed:
    """Its rows. `scratch`: a folder for a large hour's tables. Raises NotBilled."""
    if known.size < LARGE_ROWS:
        return await asyncio.to_thread(billed, known)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="hour-", ignore_cleanup_errors=True) as folder:
        await asyncio.to_thread(_ask, known, Path(folder))
        await _run(known.hour_ms, folder)
        return await asyncio.to_thread(_found, Path(folder))


async def _run(hour_ms: int, folder: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "whaleflux_console.biller", folder, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(LONGEST_S):
            _, said = await process.communicate()
    except TimeoutError:
        raise _not_billed(hour_ms, f"took more than {LONGEST_S:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise _not_billed(hour_ms, f"ended with {process.returncode}: {said.decode(errors='replace')[-500:].strip()}")


def _not_billed(hour_ms: int, why: str) -> NotBilled:
    return NotBilled(
        f"the process that bills the hour {hour_ms} {why}: it stays as it was and is tried again; "
        "see whether the console's machine is short of memory",
        retry_after_s=30.0,
    )


def _ask(known: Known, folder: Path) -> None:
    for name, table in _tables(known):
        _write(folder / name, table)
    asked = {"hour_ms": known.hour_ms, "told": len(known.told), "prices": [asdict(price) for price in known.prices]}
    (folder / _ASKED).write_text(json.dumps(asked))


def _tables(known: Known) -> Iterator[tuple[str, Any]]:
    yield from ((f"told-{place}.arrow", table) for place, table in enumerate(known.told))
    yield "samples.arrow", known.samples.select(schemas.SAMPLES_BILLED)
    yield "steps.arrow", known.steps


def _write(path: Path, table: Any) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _read(path: Path) -> Any:
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


def _found(folder: Path) -> Billed:
    found = json.loads((folder / _FOUND).read_text())
    with pa.OSFile(str(folder / _ROWS)) as file:  # no map: it outlives the folder
        rows = pa.ipc.open_file(file).read_all()
    return Billed(rows, found["residual_micros"], tuple(found["faults"]))


def main(folder: Path) -> None:
    """Bills what is asked in the folder."""
    asked = json.loads((folder / _ASKED).read_text())
    told = tuple(_read(folder / f"told-{place}.arrow") for place in range(asked["told"]))
    samples, steps = (_read(folder / f"{name}.arrow") for name in ("samples", "steps"))
    found = billed(Known(asked["hour_ms"], told, samples, steps, [price_from(each) for each in asked["prices"]]))
    _write(folder / _ROWS, found.rows)
    (folder / _FOUND).write_text(json.dumps({"residual_micros": found.residual_micros, "faults": found.faults}))


if __name__ == "__main__":
    gc.disable()  # it lives for one hour's bill, all of which it needs until its end
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    main(Path(sys.argv[1]))
