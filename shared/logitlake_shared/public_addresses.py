"""Which IP addresses belong to the public internet: what a guarded fetch may connect to, and nothing else.

Everything is refused that is not known to be public: for IPv6 that is 2000::/3 less what is carved out of it, for IPv4
the whole space less the special-purpose registry. An IPv4 address inside an IPv6 one (mapped, NAT64) counts as what it
is; tunnels (6to4, Teredo) are refused, since nobody can say where they end. Clouds answer for their metadata mostly on
link-local addresses; those that do it elsewhere are listed.
"""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

__all__ = ["is_loopback", "is_public"]

_REFUSED_V4 = tuple(
    IPv4Network(network)
    for network in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.31.196.0/24",
        "192.52.193.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "192.175.48.0/24",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",
        "240.0.0.0/4",
        "168.63.129.16/32",  # Azure's platform service: public by number, local by routing
    )
)
_PUBLIC_V6 = IPv6Network("2000::/3")
_REFUSED_V6 = tuple(
    IPv6Network(network) for network in ("2001::/23", "2001:db8::/32", "2002::/16", "2620:4f:8000::/48", "3fff::/20")
)
_NAT64 = IPv6Network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether the address, written as `socket.getaddrinfo` does, is one of the public internet."""
    try:
        known = ip_address(address)
    except ValueError:
        return False
    if isinstance(known, IPv6Address):
        if known.scope_id is not None:
            return False
        inner = _inner(known)
        if inner is None:
            return known in _PUBLIC_V6 and not any(known in network for network in _REFUSED_V6)
        known = inner
    return not any(known in network for network in _REFUSED_V4)


def is_loopback(address: str) -> bool:
    """Whether the address is this machine's own, written plainly."""
    return address == "::1" or address.startswith("127.")


def _inner(address: IPv6Address) -> IPv4Address | None:
    """The IPv4 address that a mapped or NAT64 address stands for."""
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return IPv4Address(int(address) & 0xFFFFFFFF) if address in _NAT64 else None
