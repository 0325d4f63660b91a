"""Makes an environment with CPU torch fit for vLLM on the CPU. Run by `make test` after pip.

Removes the CUDA builds of torchaudio and torchcodec that pip brings along (importing either raises `OSError`, which
vLLM does not expect) and installs `cpu_torchvision.py` beside a `.pth` file that imports it in every interpreter.
Does nothing where torch is a CUDA build. Safe to run again.
"""

import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def main() -> None:
    if "+cpu" not in version("torch"):
        print("torch is not a CPU build: nothing to prepare")
        return
    for package in ("torchaudio", "torchcodec"):
        try:
            version(package)
        except PackageNotFoundError:
            continue
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", package], check=True)
    site_packages = Path(sysconfig.get_paths()["purelib"])
    shutil.copy(Path(__file__).with_name("cpu_torchvision.py"), site_packages / "logitlake_test_cpu_torchvision.py")
    (site_packages / "logitlake_test_cpu_torchvision.pth").write_text("import logitlake_test_cpu_torchvision\n")
    print(f"CPU torch {version('torch')}: torchvision's operators are declared, torchaudio and torchcodec are gone")


if __name__ == "__main__":
    main()
