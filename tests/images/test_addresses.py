"""Which addresses a link may lead to: the whole guard is this table and `test_links.py`."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import pytest

from llava_serve.images.addresses import may_connect

GLOBAL = """
1.1.1.1 8.8.8.8 9.255.255.255 11.0.0.0 93.184.216.34 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.1
169.253.255.255 169.255.0.0 172.15.255.255 172.32.0.0 191.255.255.255 192.0.1.0 192.167.255.255 192.169.0.0
198.17.255.255 198.20.0.0 203.0.112.255 203.0.114.0 223.255.255.255
2001:4860:4860::8888 2606:4700:4700::1111 2a00:1450:4001::5e 2400:cb00::1
::ffff:8.8.8.8 64:ff9b::8.8.8.8 2002:808:808::1 2001:0:808:808:0:ffff:f7f7:f7f7
"""
REFUSED = """
0.0.0.0 0.1.2.3 10.0.0.0 10.255.255.255 100.64.0.0 100.100.100.200 100.127.255.255 127.0.0.0 127.0.0.1 127.255.255.255
168.63.129.16 169.254.0.1 169.254.169.254 169.254.170.2 172.16.0.0 172.31.255.255 192.0.0.1 192.0.0.9 192.0.0.192
192.0.2.1 192.88.99.1 192.168.0.0 192.168.255.255 198.18.0.0 198.19.255.255 198.51.100.7 203.0.113.0 224.0.0.1
239.255.255.255 240.0.0.1 255.255.255.254 255.255.255.255
:: ::1 ::2 ::7f00:1 ::8.8.8.8 fc00::1 fd00::1 fd00:ec2::254 fd20:ce::254 fe80::1 fec0::1 ff02::1 ff0e::1
100::1 2001:db8::1 2001:1::1 2001:10::1 2001:20::1 3fff::1 4000::1 5f00::1 64:ff9b:1::808:808
fe80::1%eth0 2606:4700:4700::1111%2
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254 ::ffff:0.0.0.0
64:ff9b::127.0.0.1 64:ff9b::10.1.2.3 64:ff9b::169.254.169.254 64:ff9b::192.168.1.1
2002:7f00:1:: 2002:a00:1::1 2002:a9fe:a9fe::1 2002:c0a8:101::1
2001:0:808:808:0:ffff:80ff:fffe 2001:0:7f00:1:0:ffff:f7f7:f7f7 2001:0:a00:1::f5ff:fffe
"""


@pytest.mark.parametrize("address", GLOBAL.split())
def test_global_addresses(address: str) -> None:
    assert may_connect(ip_address(address))


@pytest.mark.parametrize("address", REFUSED.split())
def test_refused_addresses(address: str) -> None:
    assert not may_connect(ip_address(address))


@pytest.mark.parametrize(
    ("address", "network", "allowed"),
    [
        ("10.1.2.3", "10.0.0.0/8", True),
        ("11.1.2.3", "10.0.0.0/8", True),  # a host with a private network may still be public
        ("192.168.0.1", "10.0.0.0/8", False),
        ("127.0.0.1", "127.0.0.0/8", True),
        ("::ffff:10.1.2.3", "10.0.0.0/8", True),
        ("::ffff:127.0.0.1", "10.0.0.0/8", False),
        ("64:ff9b::10.1.2.3", "10.0.0.0/8", True),
        ("fd12::1", "fd12::/16", True),
        ("fd13::1", "fd12::/16", False),
        ("fd12::1%eth0", "fd12::/16", False),
        ("100.64.0.1", "100.64.0.0/10", True),
        # what no network opens
        ("169.254.169.254", "0.0.0.0/0", False),
        ("::ffff:169.254.169.254", "0.0.0.0/0", False),
        ("100.100.100.200", "100.64.0.0/10", False),
        ("168.63.129.16", "0.0.0.0/0", False),
        ("0.0.0.0", "0.0.0.0/0", False),
        ("224.0.0.1", "0.0.0.0/0", False),
        ("255.255.255.255", "0.0.0.0/0", False),
        ("fd00:ec2::254", "fc00::/7", False),
        ("fe80::1", "::/0", False),
        ("ff02::1", "::/0", False),
        ("::", "::/0", False),
    ],
)
def test_named_networks(address: str, network: str, allowed: bool) -> None:
    assert may_connect(ip_address(address), [ip_network(network)]) == allowed
