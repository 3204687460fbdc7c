"""What a rank finds of its agent's own environment: where programs and libraries are, nothing that may be a secret.

A list of what passes, since nobody can list what may not: an agent's unit file or shell may hold tokens of clouds, registries and trackers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

PASSED = (
    # the user and the shell
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "LC_*", "TZ", "TMPDIR", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR",
    # programs and libraries
    "LD_LIBRARY_PATH", "LD_PRELOAD", "LIBRARY_PATH", "CPATH", "PYTHON*", "VIRTUAL_ENV", "CONDA_*", "MAMBA_*", "MODULEPATH", "LOADEDMODULES",
    # GPUs, networks and numerics
    "CUDA_*", "NVIDIA_*", "NVSHMEM_*", "NCCL_*", "GLOO_*", "UCX_*", "FI_*", "RDMAV_*", "OMPI_*", "OMP_*", "MKL_*", "OPENBLAS_*", "NUMEXPR_*",
    "TORCH_*", "TRITON_*", "PYTORCH_*",
    # ways out: proxies and whom to trust
    "http_proxy", "https_proxy", "no_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY", "SSL_CERT_FILE",
    "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
)  # fmt: skip


def passed_on(environment: Mapping[str, str], more: Sequence[str] = ()) -> dict[str, str]:
    """The variables whose names are in `PASSED` or `more`; `*` in a name stands for anything."""
    patterns = (*PASSED, *more)
    return {name: value for name, value in environment.items() if any(fnmatchcase(name, one) for one in patterns)}
