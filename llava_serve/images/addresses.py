"""Which addresses a link in a request may lead to. Pure arithmetic over `ipaddress`; nothing is resolved in here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network


def _networks(*spelled: str) -> tuple[Network, ...]:
    return tuple(ip_network(each) for each in spelled)


# What no config opens: these are no hosts that hold pictures, and clouds give their machines' secrets to whoever asks.
_NEVER = _networks(
    "0.0.0.0/8",
    "169.254.0.0/16",  # link-local; most clouds' metadata
    "224.0.0.0/4",
    "255.255.255.255/32",
    "100.100.100.200/32",  # metadata of Alibaba
    "168.63.129.16/32",  # the host of an Azure machine, at an address that is global by its number
    "192.0.0.192/32",  # metadata of Oracle's older machines
    "::/128",
    "fe80::/10",
    "fec0::/10",
    "ff00::/8",
    "fd00:ec2::/32",  # metadata and credentials of AWS
    "fd20:ce::254/128",  # metadata of Google
)
# IANA's special-purpose registries, as far as `is_global` of some Python 3.11 takes them for global.
_NOT_GLOBAL = _networks("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "3fff::/20")
_GLOBAL_IPV6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")


def may_connect(address: Address, networks: Sequence[Network] = ()) -> bool:
    """Whether a connection to an address stays among global addresses and the named networks.

    Args:
        address: a form that carries another address (IPv4-mapped, 6to4, NAT64, Teredo) is judged by that one; one with
            a scope is refused, since it means another machine on each interface.
        networks: private ones that are allowed, too.
    """
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return False
    return all(_is_allowed(each, networks) for each in _destinations(address))


def _destinations(address: Address) -> Iterable[Address]:
    if isinstance(address, IPv4Address):
        return (address,)
    if address.teredo is not None:
        return address.teredo  # the server, and the client behind it
    if address in _NAT64:
        return (IPv4Address(int(address) & 0xFFFF_FFFF),)
    return (address.ipv4_mapped or address.sixtofour or address,)


def _is_allowed(address: Address, networks: Sequence[Network]) -> bool:
    if any(address in each for each in _NEVER):
        return False
    if any(address in each for each in networks):
        return True
    if isinstance(address, IPv6Address) and address not in _GLOBAL_IPV6:
        return False
    return address.is_global and not any(address in each for each in _NOT_GLOBAL)
