"""Which IP addresses are anybody's, and which are only reached from inside a network."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

# All that IANA has given out for the Internet. What lies outside is either local or holds an IPv4 address.
_GLOBAL_UNICAST = IPv6Network("2000::/3")
# RFC 6052: a gateway sends it on to the IPv4 address in its last 32 bits.
_NAT64 = IPv6Network("64:ff9b::/96")
# What `ipaddress` calls global and clouds answer from inside, with credentials among the rest: IETF assignments (not
# known to every Python that we run on; Oracle), Azure.
_OF_CLOUDS = (IPv4Network("192.0.0.0/24"), IPv4Network("168.63.129.16/32"))


def is_public(text: str) -> bool:
    """Whether an address, as the resolver writes it, is reached over the Internet.

    False for what is private, loopback, link-local, shared, multicast, unspecified or reserved, also where an IPv6
    address stands for such an IPv4 address.
    """
    address = ip_address(text)
    if isinstance(address, IPv6Address):
        inner = _ipv4_inside(address)
        if inner is None:
            # 6to4 and Teredo hold an IPv4 address each; nobody has a server behind them.
            tunnelled = address.sixtofour is not None or address.teredo is not None
            return address in _GLOBAL_UNICAST and address.is_global and not tunnelled
        address = inner
    # Multicast counts as global in `ipaddress`.
    return address.is_global and not address.is_multicast and not any(address in network for network in _OF_CLOUDS)


def _ipv4_inside(address: IPv6Address) -> IPv4Address | None:
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped
