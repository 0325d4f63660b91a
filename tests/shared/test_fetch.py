"""The guarded fetcher against a loopback server that does everything a hostile host can do.

The server counts its requests: what must be refused by policy must not even be asked.
"""

import gzip
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from logitlake_shared.errors import ImageError
from logitlake_shared.fetch import Fetcher, FetchPolicy
from logitlake_shared.public_addresses import is_public

HOST = "images.example.org"
BODY = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8
# For a host that answers: more than a round trip on loopback takes on a busy machine.
PATIENT_S = 20.0
# For one that does not: it is waited for.
SHORT_S = 0.6
METADATA = "169.254.169.254"


def answer(body: bytes = BODY, *, status: str = "200 OK", **headers: str) -> bytes:
    """A response; a header's name has `_` for `-`, and an empty value leaves the header out."""
    fields = {"Content-Type": "image/png", "Content-Length": str(len(body))}
    fields |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in fields.items() if value)]
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Server:
    """A loopback server: each path does what its handler does with the connection."""

    handlers: dict[str, Callable[[socket.socket], None]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """the paths that were asked for, in order"""
    connections: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    def says(self, path: str, *answers: bytes) -> None:
        """The path gives these answers, one a request; the last one for ever."""
        left = list(answers)

        def handler(connection: socket.socket) -> None:
            connection.sendall(left.pop(0) if len(left) > 1 else left[0])

        self.handlers[path] = handler

    def url(self, path: str, host: str = HOST, scheme: str = "http") -> str:
        """The address of a path under a name."""
        return f"{scheme}://{host}:{self.port}{path}"


@pytest.fixture
def server() -> Iterator[Server]:
    """A server on a free port of 127.0.0.1."""
    yield from _serve(Server(), None)


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[Server]:
    """The same with a certificate that nobody vouches for."""
    yield from _serve(Server(), _self_made(tmp_path))


def _self_made(folder: Path) -> ssl.SSLContext:
    subject = ["-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"]
    keys = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *subject, *keys],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


def _serve(server: Server, tls: ssl.SSLContext | None) -> Iterator[Server]:
    listener = socket.create_server(("127.0.0.1", 0))
    server.port = listener.getsockname()[1]
    threads: list[threading.Thread] = []

    def talk(connection: socket.socket) -> None:
        try:
            with connection if tls is None else tls.wrap_socket(connection, server_side=True) as stream:
                head = b""
                while b"\r\n\r\n" not in head:
                    piece = stream.recv(4096)
                    if not piece:
                        return
                    head += piece
                    if not head.startswith(b"GET "):
                        stream.sendall(answer(b"", status="400 Bad Request"))
                        return
                path = head.split(b" ")[1].decode()
                server.requests.append(path)
                server.handlers[path.partition("?")[0]](stream)
        except OSError:
            return  # the client has enough: that is what is tested

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            server.connections += 1
            threads.append(threading.Thread(target=talk, args=(connection,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    yield server
    server.stopped.set()
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    accepting.join()
    for thread in threads:
        thread.join()


def names(*addresses: str) -> Callable[[str, int], Sequence[str]]:
    """A resolver that gives every name these addresses."""

    def resolve(host: str, port: int) -> Sequence[str]:
        return addresses

    return resolve


loopback = names("127.0.0.1")


def fetcher(resolve: Callable[[str, int], Sequence[str]] | None = None, **policy: object) -> Fetcher:
    """A fetcher that may ask `HOST` on loopback, whatever else the policy says; pauses take no time."""
    allowed = {"allow_hosts": frozenset((HOST,)), "allow_loopback": True, "timeout_s": PATIENT_S, "max_bytes": 10**6}
    made = FetchPolicy(**(allowed | policy))
    return Fetcher(made, resolve=resolve or loopback, wait=[].append)


def refused(code: str, fetch: Fetcher, url: str) -> str:
    """The message of the refusal, which begins with the code."""
    with pytest.raises(ImageError) as caught:
        fetch(url)
    message = str(caught.value)
    assert message.startswith(f"{code}: "), message
    return message


# ---- what works ----


def test_the_body_comes_as_it_is(server: Server) -> None:
    """By length, in chunks, and to the end of the connection; a query reaches the server."""
    server.says("/a", answer())
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (BODY[:7], BODY[7:])) + b"0\r\n\r\n"
    server.says("/b", answer(chunks, Transfer_Encoding="chunked", Content_Length=""))
    server.says("/c", answer(Content_Length=""))
    fetch = fetcher()
    assert [fetch(server.url(path)) for path in ("/a?size=1&token=x", "/b", "/c")] == [BODY] * 3
    assert server.requests == ["/a?size=1&token=x", "/b", "/c"]


def test_hosts_below_an_allowed_one(server: Server) -> None:
    """`*.example.org` allows what is below it, not itself and not a name that merely ends so."""
    server.says("/a", answer())
    fetch = fetcher(allow_hosts=frozenset(("*.example.org",)))
    assert fetch(server.url("/a", "deep.images.example.org")) == BODY
    for host in ("example.org", "evilexample.org", "example.org.evil.net"):
        refused("image_url_refused", fetch, server.url("/a", host))
    assert server.connections == 1


def test_an_allowed_redirect_is_followed_and_checked_again(server: Server) -> None:
    """One redirect is followed where one is allowed; its target must be allowed as any other address."""
    server.says("/a", answer(b"", status="302 Found", Location="/b"))
    server.says("/b", answer())
    server.says("/c", answer(b"", status="302 Found", Location=f"http://{METADATA}/latest/meta-data"))
    server.says("/d", answer(b"", status="302 Found", Location="file:///etc/passwd"))
    fetch = fetcher(max_redirects=1)
    assert fetch(server.url("/a")) == BODY
    refused("image_url_refused", fetch, server.url("/c"))
    refused("image_url_refused", fetch, server.url("/d"))


def test_a_busy_host_is_asked_again_with_pauses(server: Server) -> None:
    """500 and a broken connection are tried again, with pauses that double; 404 and 403 are not."""
    server.says("/a", answer(b"", status="503 Busy"), b"", answer())
    server.says("/gone", answer(b"", status="404 Not Found"))
    server.says("/no", answer(b"", status="403 Forbidden"))
    server.says("/never", answer(b"", status="500 Broken"))
    pauses: list[float] = []
    policy = FetchPolicy(frozenset((HOST,)), timeout_s=PATIENT_S, attempts=3, allow_loopback=True)
    fetch = Fetcher(policy, resolve=loopback, wait=pauses.append)
    assert fetch(server.url("/a")) == BODY
    assert pauses[1] == 2 * pauses[0]
    refused("image_missing", fetch, server.url("/gone"))
    refused("image_fetch_failed", fetch, server.url("/no"))
    assert "3 attempts" in refused("image_fetch_failed", fetch, server.url("/never"))
    assert server.requests == ["/a"] * 3 + ["/gone", "/no"] + ["/never"] * 3


# ---- addresses that are never asked ----


HOSTILE = [
    "http://images.example.org/a",
    "ftp://images.example.org/a",
    "file:///etc/passwd",
    "gopher://images.example.org/_GET",
    "//images.example.org/a",
    "images.example.org/a",
    "https://images.example.org.evil.net/a",
    "https://evil.net/images.example.org",
    "https://images.example.org@evil.net/a",
    "https://user:secret@images.example.org/a",
    "https://images.example.org:22/a",
    "https://images.example.org:8443/a",
    "https://images.example.org:99999/a",
    "https://127.0.0.1/a",
    "https://2130706433/a",
    "https://0x7f000001/a",
    "https://0x7f.1/a",
    "https://0177.0.0.1/a",
    "https://127.1/a",
    "https://[::1]/a",
    "https://[::ffff:127.0.0.1]/a",
    "https://[fe80::1%25eth0]/a",
    "https://169.254.169.254/latest/meta-data",
    "https://localhost/a",
    "https://images.example.org/a\r\nX-Injected: 1",
    "https://images.example.org/a\nHost: evil.net",
    "https://images.example.org\t/a",
    "https://images.example.org/ a",
    "https://images.example.org\\@evil.net/a",
    "https://images.example.org#@evil.net/a\\",
    "https://images。example。org/a",
    "https://ïmages.example.org/a",
    "https://images.example.org%2eevil.net/a",
    "https://images.example.org\0.evil.net/a",
    "https:///a",
    "https://.images.example.org/a",
    "https://images.example.org/" + "a" * 9000,
    "",
]


@pytest.mark.parametrize("url", HOSTILE, ids=lambda url: url[:48].encode("unicode_escape").decode())
def test_an_address_that_is_not_allowed_is_not_even_resolved(url: str) -> None:
    """No name is looked up and no connection made; the message has no control character in it."""

    def resolve(host: str, port: int) -> list[str]:
        raise AssertionError(f"{host} was looked up")

    fetch = Fetcher(FetchPolicy(frozenset((HOST,))), resolve=resolve)
    message = refused("image_url_refused", fetch, url)
    assert message.isprintable()
    assert "secret" not in message


def test_by_default_no_host_is_allowed() -> None:
    """A policy that says nothing allows nothing."""
    assert "allow_hosts" in refused("image_url_refused", Fetcher(FetchPolicy()), f"https://{HOST}/a")


REFUSED_ADDRESSES = [
    "127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", METADATA,
    "100.64.0.1", "100.100.100.200", "192.0.0.192", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "168.63.129.16", "192.0.2.1", "192.88.99.1", "::", "::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254",
    "::127.0.0.1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2002:7f00:1::",
    "2002:a9fe:a9fe::1", "2001:0:4136:e378::1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2001:db8::1",
    "3fff::1", "100::1", "not an address", "",
]  # fmt: skip


@pytest.mark.parametrize("address", REFUSED_ADDRESSES)
def test_a_name_that_stands_for_a_private_address_is_refused(address: str, server: Server) -> None:
    """Whatever the allowed name resolves to is checked, alone and among public addresses."""
    assert not is_public(address)
    for addresses in ([address], ["93.184.215.14", address]):
        fetch = Fetcher(FetchPolicy(frozenset((HOST,))), resolve=names(*addresses))
        refused("image_url_refused", fetch, f"https://{HOST}/a")


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "172.32.0.1"]
)
def test_public_addresses_are_public(address: str) -> None:
    """The other side of the law: the list refuses no address of the internet."""
    assert is_public(address)


def test_a_name_that_changes_its_address_changes_nothing(server: Server) -> None:
    """DNS rebinding: the name is looked up once an attempt, and what was checked is what is connected to."""
    server.says("/a", answer())
    asked: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else [METADATA]

    fetch = fetcher(rebinding)
    assert fetch(server.url("/a")) == BODY
    assert asked == [HOST]
    assert METADATA in refused("image_url_refused", fetch, server.url("/a"))
    assert server.connections == 1


def test_a_proxy_in_the_environment_is_not_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection goes to the checked address, not to whom the environment names."""
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.says("/a", answer())
    assert fetcher()(server.url("/a")) == BODY
    assert server.requests == ["/a"]


# ---- answers that are not taken ----


def test_redirects_are_refused(server: Server) -> None:
    """To metadata, to a file, to itself: none is followed, and the server is asked once each."""
    targets = {
        "/meta": f"http://{METADATA}/",
        "/file": "file:///etc/passwd",
        "/loop": "/loop",
        "/tls": "https://evil.net",
    }
    for path, target in targets.items():
        server.says(path, answer(b"", status="301 Moved", Location=target))
        assert "redirect" in refused("image_url_refused", fetcher(), server.url(path))
    assert server.requests == list(targets)


def test_a_redirect_loop_ends(server: Server) -> None:
    """As many redirects as are allowed are followed, and no more."""
    server.says("/loop", answer(b"", status="302 Found", Location="/loop"))
    refused("image_url_refused", fetcher(max_redirects=3), server.url("/loop"))
    assert len(server.requests) == 4


ANSWERS = {
    "a page": ("image_format", answer(b"<html>", Content_Type="text/html")),
    "SVG is no image here": ("image_format", answer(Content_Type="text/xml")),
    "gzip, small": ("image_fetch_failed", answer(gzip.compress(BODY), Content_Encoding="gzip")),
    "gzip, a bomb": ("image_fetch_failed", answer(gzip.compress(bytes(10**8)), Content_Encoding="gzip")),
    "brotli": ("image_fetch_failed", answer(Content_Encoding="br")),
    "too large by its own word": ("image_too_large", answer(Content_Length=str(10**7))),
    "2^70 bytes by its own word": ("image_too_large", answer(Content_Length=str(2**70))),
    "shorter than its word": ("image_fetch_failed", answer(Content_Length=str(len(BODY) + 1))),
    "no such image": ("image_missing", answer(b"", status="410 Gone")),
    "a part of it": ("image_fetch_failed", answer(status="206 Partial Content")),
    "no content": ("image_fetch_failed", answer(b"", status="204 No Content")),
    "not HTTP": ("image_fetch_failed", b"SSH-2.0-OpenSSH_9.6\r\n"),
    "nothing": ("image_fetch_failed", b""),
    "an endless header line": ("image_fetch_failed", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000),
    "a thousand headers": ("image_fetch_failed", b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000 + b"\r\n"),
    "a chunk of negative size": (
        "image_fetch_failed",
        answer(b"-5\r\nabc", Transfer_Encoding="chunked", Content_Length=""),
    ),
    "escapes for the terminal": ("image_fetch_failed", b"\x1b]0;pwned\x07\x1b[2J\r\n"),
    "escapes in its type": ("image_format", answer(Content_Type="\x1b[2Jtext/html")),
    "a redirect to what is no address": ("image_url_refused", answer(status="302 Found", Location="http://[")),
    "a chunk of no size": ("image_fetch_failed", answer(b"zz\r\n", Transfer_Encoding="chunked", Content_Length="")),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_is_no_image_has_its_code(name: str, server: Server) -> None:
    """Each is refused with its code; nothing is decompressed, and no more is read than allowed."""
    code, said = ANSWERS[name]
    server.says("/a", said)
    message = refused(code, fetcher(attempts=1), server.url("/a"))
    assert message.isprintable()
    assert len(message) < 1000


def test_an_endless_body_is_cut_off(server: Server) -> None:
    """With and without chunks, reading ends at the cap, not at the end of memory or time."""

    def endless(head: bytes, piece: bytes) -> Callable[[socket.socket], None]:
        def handler(connection: socket.socket) -> None:
            connection.sendall(head)
            while not server.stopped.is_set():
                connection.sendall(piece)

        return handler

    server.handlers["/plain"] = endless(answer(b"", Content_Length=""), bytes(2**16))
    chunked = answer(b"", Content_Length="", Transfer_Encoding="chunked")
    server.handlers["/chunked"] = endless(chunked, b"10000\r\n" + bytes(2**16) + b"\r\n")
    server.handlers["/continue"] = endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100)
    for path in server.handlers:
        refused("image_too_large", fetcher(), server.url(path))


def test_silence_and_drops_are_given_up(server: Server) -> None:
    """No answer, a header and then nothing, one byte now and then: each ends within the time allowed."""

    def silent(connection: socket.socket) -> None:
        server.stopped.wait()

    def half(connection: socket.socket) -> None:
        connection.sendall(answer()[:200])
        server.stopped.wait()

    def dripping(connection: socket.socket) -> None:
        for byte in answer() * 100:
            connection.sendall(bytes([byte]))
            if server.stopped.wait(SHORT_S / 30):
                return

    server.handlers = {"/silent": silent, "/half": half, "/drip": dripping}
    for path in ("/silent", "/half", "/drip"):
        refused("image_fetch_timeout", fetcher(timeout_s=SHORT_S), server.url(path))
    assert server.requests == ["/silent", "/half", "/drip"]  # a slow host is not asked again


def test_a_drip_is_given_up_before_the_time_is_over(server: Server) -> None:
    """The least speed counts in windows: a host that is too slow is not waited for to the end."""

    def dripping(connection: socket.socket) -> None:
        connection.sendall(answer(b"", Content_Length="1000000"))
        while not server.stopped.wait(0.02):
            connection.sendall(b"x")

    server.handlers["/drip"] = dripping
    message = refused("image_fetch_timeout", fetcher(timeout_s=3.0), server.url("/drip"))
    assert "0.5 s" in message  # a sixth of the time, which is a window


def test_a_resolver_that_never_answers_is_left_behind() -> None:
    """The time holds for the name, too."""
    answered = threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        answered.wait()
        return []

    refused("image_fetch_timeout", fetcher(resolve, timeout_s=0.2), f"http://{HOST}/a")
    answered.set()


def test_a_name_without_an_address_is_a_failure() -> None:
    """A resolver's error has the code of a failed fetch."""

    def resolve(host: str, port: int) -> list[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert "has no address" in refused("image_fetch_failed", fetcher(resolve), f"http://{HOST}/a")


# ---- TLS ----


def test_a_certificate_that_nobody_vouches_for_is_refused(tls_server: Server) -> None:
    """The right name is not enough; no request is sent."""
    tls_server.says("/a", answer())
    message = refused("image_fetch_failed", fetcher(), tls_server.url("/a", scheme="https"))
    assert "cannot prove its name" in message
    assert tls_server.requests == []


def test_a_trusted_certificate_must_be_of_the_name(tls_server: Server, tmp_path: Path) -> None:
    """With the certificate trusted, its own name works and another allowed one does not."""
    tls_server.says("/a", answer())
    trusting = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
    policy = FetchPolicy(frozenset((HOST, "other.example.org")), timeout_s=PATIENT_S, allow_loopback=True)
    fetch = Fetcher(policy, resolve=loopback, tls=trusting)
    assert fetch(tls_server.url("/a", scheme="https")) == BODY
    refused("image_fetch_failed", fetch, tls_server.url("/a", "other.example.org", "https"))
    assert tls_server.requests == ["/a"]


def test_a_host_without_tls_is_refused(server: Server) -> None:
    """https to a server that speaks plain http fails; nothing is asked in the clear."""
    server.says("/a", answer())
    refused("image_fetch_failed", fetcher(attempts=1), server.url("/a", scheme="https"))
    assert server.requests == []


# ---- secrets ----


def test_no_message_shows_a_secret(server: Server) -> None:
    """The query of an address may hold a signature: it is in no message of any code."""
    server.says("/gone", answer(b"", status="404 Not Found"))
    server.says("/busy", answer(b"", status="500 Broken"))
    server.says("/page", answer(Content_Type="text/html"))
    server.says("/away", answer(b"", status="302 Found", Location="https://evil.net/?sig=canary"))
    for path in ("/gone", "/busy", "/page", "/away"):
        with pytest.raises(ImageError) as caught:
            fetcher(max_bytes=10)(server.url(f"{path}?sig=canary#canary"))
        assert "canary" not in str(caught.value)
    assert "canary" not in refused("image_url_refused", fetcher(), f"https://canary:canary@{HOST}/?sig=canary")
