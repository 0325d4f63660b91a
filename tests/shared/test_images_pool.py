"""Decoder processes: what goes wrong in one costs its image, and nothing it says is believed."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from PIL import Image

from logitlake_shared.errors import ConfigError, ImageError
from logitlake_shared.image_decoder.decoding import ImageLimits
from logitlake_shared.images import DecodedImage, DecoderPool
from logitlake_shared.images.pool import DecoderDiedError, checked_reply

SHORT_S = 0.5  # of a decoder that is stopped; nothing else here waits for it


def decoders() -> list[psutil.Process]:
    """The decoder processes of this process."""
    children = psutil.Process().children()
    return [child for child in children if "logitlake_shared.image_decoder.process" in child.cmdline()]


def test_the_pool_decodes_as_this_process_does(png: Callable[[int], bytes]) -> None:
    """Order, digest, header and pixels are those of decoding here, however many processes share the work."""
    images = [png(number) for number in range(20)]
    with DecoderPool(num_processes=3) as pool:
        answers = pool.decode_all(images)
    for data, answer in zip(images, answers, strict=True):
        expected = DecodedImage.of(data)
        assert isinstance(answer, DecodedImage)
        assert (answer.image_sha256, answer.header) == (expected.image_sha256, expected.header)
        np.testing.assert_array_equal(answer.rgb_HWC, expected.rgb_HWC)
        assert answer.lake_row(data).data is data


def test_a_decoder_that_was_killed_is_replaced_and_its_image_decoded(png: Callable[[int], bytes]) -> None:
    """The machine may kill a decoder for somebody else's memory: that is no fault of the image."""
    with DecoderPool(num_processes=2) as pool:
        pool.decode_all([png(0)])
        for _ in range(3):
            for decoder in decoders():
                decoder.send_signal(signal.SIGKILL)
            assert all(isinstance(answer, DecodedImage) for answer in pool.decode_all([png(1), png(2), png(3)]))


def test_a_decoder_that_hangs_costs_its_image_alone(png: Callable[[int], bytes]) -> None:
    """Stopped decoders are given up after the time; their images get the code, the next ones are decoded."""
    with DecoderPool(num_processes=2, timeout_s=SHORT_S) as pool:
        pool.decode_all([png(0), png(1)])
        stopped = decoders()
        for decoder in stopped:
            decoder.send_signal(signal.SIGSTOP)
        answers = pool.decode_all([png(2), png(3), png(4), png(5)])
        assert [isinstance(answer, ImageError) for answer in answers] == [True, True, False, False]
        assert str(answers[0]).startswith("image_timeout: ")
        assert not any(decoder.is_running() for decoder in stopped)


def test_an_image_that_needs_more_memory_than_a_decoder_has_gets_a_code(png: Callable[[int], bytes]) -> None:
    """64 million grey pixels are legal by the limits and too much for 256 MiB; the decoder lives on."""
    buffer = io.BytesIO()
    Image.new("L", (8000, 8000)).save(buffer, "PNG")
    with DecoderPool(num_processes=1, memory_mib=256) as pool:
        answers = pool.decode_all([buffer.getvalue(), png(1)])
    assert str(answers[0]).startswith("image_too_large: ")
    assert isinstance(answers[1], DecodedImage)


def test_a_decoder_cannot_open_files_or_see_secrets(
    monkeypatch: pytest.MonkeyPatch, png: Callable[[int], bytes]
) -> None:
    """Its environment is empty but for where its modules are, and its limits leave it memory and time only."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary")
    with DecoderPool(num_processes=1, memory_mib=300) as pool:
        pool.decode_all([png(0)])
        (decoder,) = decoders()
        assert set(decoder.environ()) <= {"PYTHONPATH", "LD_LIBRARY_PATH", "LC_CTYPE"}
        assert decoder.rlimit(psutil.RLIMIT_AS)[0] == 300 * 2**20
        assert decoder.rlimit(psutil.RLIMIT_NOFILE) == (3, 3)
        assert decoder.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert decoder.rlimit(psutil.RLIMIT_CPU)[0] < 120
        assert decoder.num_fds() == 3
        assert os.getsid(decoder.pid) == decoder.pid


def test_a_decoder_that_cannot_start_is_not_blamed_on_an_image(
    monkeypatch: pytest.MonkeyPatch, png: Callable[[int], bytes]
) -> None:
    """A program that ends at once is a fault of the installation, and says so."""
    monkeypatch.setattr("sys.executable", "/bin/false")
    with DecoderPool(num_processes=1) as pool, pytest.raises(ConfigError, match="no image can be decoded"):
        pool.decode_all([png(0)])


def test_closing_leaves_no_process_and_twice_is_fine(png: Callable[[int], bytes]) -> None:
    """Used or not, a closed pool has no children."""
    used, unused = DecoderPool(num_processes=2), DecoderPool(num_processes=2)
    used.decode_all([png(0)])
    for pool in (used, unused, used):
        pool.close()
    assert decoders() == []


def test_decoders_end_with_a_process_that_was_killed() -> None:
    """Nobody closes the pool of a killed worker: its decoders see the end of their input and go."""
    program = (
        "import os, psutil\n"
        "from logitlake_shared.images import DecoderPool\n"
        "pool = DecoderPool(num_processes=2)\n"
        "pool.decode_all([b''] * 8)\n"
        "print(*(child.pid for child in psutil.Process().children()), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    orphans = []
    for pid in map(int, done.stdout.split()):
        with contextlib.suppress(psutil.NoSuchProcess):
            orphans.append(psutil.Process(pid))
    assert len(done.stdout.split()) == 2
    _, alive = psutil.wait_procs(orphans, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_several_threads_share_a_pool(png: Callable[[int], bytes]) -> None:
    """Units in flight decode at the same time, and each gets its own pixels."""
    barrier = threading.Barrier(4)
    with DecoderPool(num_processes=2) as pool, ThreadPoolExecutor(4) as threads:

        def unit(number: int) -> bool:
            barrier.wait()
            answers = pool.decode_all([png(number)] * 20)
            expected = DecodedImage.of(png(number)).rgb_HWC
            return all(isinstance(answer, DecodedImage) and (answer.rgb_HWC == expected).all() for answer in answers)

        assert all(threads.map(unit, range(4)))


SAID = {"format": "PNG", "width": 4, "height": 3, "size": [4, 3]}


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        json.dumps(SAID | {"size": [10**5, 10**5]}).encode(),
        json.dumps(SAID | {"size": [0, 3]}).encode(),
        json.dumps(SAID | {"size": [-4, -3]}).encode(),
        json.dumps(SAID | {"size": [1, 2, 3]}).encode(),
        json.dumps(SAID | {"format": "EPS"}).encode(),
        json.dumps(SAID | {"width": "wide"}).encode(),
        json.dumps({"code": "lake_corrupt", "message": ""}).encode(),
        json.dumps({"code": "image_\n", "message": ""}).encode(),
        json.dumps({"code": "image_decode"}).encode(),
    ],
)
def test_an_answer_that_no_decoder_gives_is_not_believed(head: bytes) -> None:
    """A decoder that was taken over can neither choose how much memory is asked for nor invent a code."""
    with pytest.raises(DecoderDiedError):
        checked_reply(head, ImageLimits.DEFAULT)


def test_the_answers_that_decoders_give_are_understood() -> None:
    """The two kinds of answer, as the process writes them."""
    reply = checked_reply(json.dumps(SAID).encode(), ImageLimits.DEFAULT)
    assert not isinstance(reply, ImageError)
    assert (reply.width, reply.height, reply.header.format) == (4, 3, "PNG")
    error = checked_reply(b'{"code": "image_decode", "message": "broken"}', ImageLimits.DEFAULT)
    assert str(error) == "image_decode: broken"
    error = checked_reply(b'{"code": "image_decode", "message": "\\u001b[2Jbroken"}', ImageLimits.DEFAULT)
    assert str(error) == "image_decode: ?[2Jbroken"
