"""A head of another trainer, from a folder or the hub, as a head that can be evaluated and trained on.

    import_head("nvidia/Llama-4-Maverick-17B-128E-Eagle3", settings, "trtllm", Path("heads/nvidia"))

Conventions that its files do not state are listed in its card, in its ``config.json``, and on the screen; the figures of
its own card go with it, so that an evaluation can say whether it was read rightly (:mod:`.report`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save

from ..configs.errors import UserError
from ..configs.settings import Settings
from ..data.files import encode_json, sha256, write_folder
from ..models.checkpoint import CONFIG, PICKLED, WEIGHTS, config_of
from ..models.engines import TRTLLM_OPTIONS, read_files
from ..models.formats import FORMATS, PROVENANCE
from ..models.imports import Imported, take
from ..models.target import DTYPES
from ..models.target_files import TargetFiles
from .card import CARD, figures, front_matter
from .export import form_of

NEEDED = [CARD, CONFIG, TRTLLM_OPTIONS, PICKLED, "*.safetensors"]


def import_head(head: str, settings: Settings, name: str, out: Path) -> None:
    """Write the head in ``head``, a folder or hub name of format ``name``, to ``out`` as a head of ours.

    Raises:
        UserError: no such head or format, a head that does not fit the recipe's target or is of an unknown kind, or an
            ``out`` that is not empty or cannot be written.
    """
    form_of(name)
    folder = _located(head)
    files, target = read_files(folder), TargetFiles(settings.target)
    imported = take(name, folder, files, target)
    stored = files.tensors["fc.weight"].dtype
    dtype = stored if stored in DTYPES.values() else torch.float32
    tensors = {
        key: (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        for key, tensor in imported.draft.state_dict().items()
    }
    unknown = {
        "name": target.name,
        "revision": target.revision,
        "weights_sha256": None,
        "num_layers": target.num_layers,
        "dtype": None,
    }
    noted: dict[str, Any] = {
        PROVENANCE: files.config.get(PROVENANCE, unknown),
        "eagle3_import": {
            "from": head,
            "format": name,
            "config_sha256": sha256((folder / CONFIG).read_bytes()),
            "assumed": imported.assumed,
            "figures": figures(folder),
        },
    }
    contents = {
        WEIGHTS: save(tensors, metadata={"format": "pt"}),
        CONFIG: encode_json(noted | config_of(imported.draft.config, dtype)),
        CARD: _card(head, name, target.name, imported).encode(),
    }
    write_folder(out, contents, "--out")
    print("\n".join([f"{out}: {head}, of which the files do not say all. Taken as given:", *_listed(imported)]))


def _located(head: str) -> Path:
    """The folder of ``head``, downloaded if it is no folder here."""
    if Path(head).is_dir():
        return Path(head)
    try:
        return Path(snapshot_download(head, allow_patterns=NEEDED))
    except (OSError, ValueError) as error:  # no such name, no connection, no permission
        problem = str(error).strip().partition("\n")[0].rstrip(".")
        remedy = "give the folder of a head, or its hub name and a connection to the hub"
        raise UserError("HEAD", head, problem, remedy) from error


def _listed(imported: Imported) -> list[str]:
    return [f"  - {line}" for line in imported.assumed]


def _card(head: str, name: str, target: str, imported: Imported) -> str:
    parts = [
        f"# EAGLE-3 draft head for {target}",
        f"Imported from {head}, whose files were read as those of format `{name}` ({FORMATS[name].text}).",
        "They do not say all of what a head is. Taken as given:",
        "\n".join(_listed(imported)),
        "A head that was misread still drafts, badly: evaluate it (`eagle3 eval CONFIG eval.draft=...`), and compare "
        "with the figures of those who trained it.",
    ]
    return front_matter({"base_model": target, "tags": ["eagle3", "speculative-decoding"]}) + "\n\n".join(parts) + "\n"
