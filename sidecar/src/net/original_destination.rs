//! Where a redirected connection was going: `SO_ORIGINAL_DST` (netfilter `nf_conntrack`), IPv4 and IPv6.

use std::{
    io,
    net::{Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::AsFd,
};

use nix::sys::socket::{getsockopt, sockopt};

/// The destination that the client dialled before netfilter redirected the connection. A connection that was
/// not redirected gives its local address, or an error where connection tracking does not know it.
///
/// # Errors
/// What `getsockopt` says; `ENOENT` where the connection is not tracked.
pub fn original_destination(socket: impl AsFd, is_ipv6: bool) -> io::Result<SocketAddr> {
    if is_ipv6 {
        let raw = getsockopt(&socket, sockopt::Ip6tOriginalDst)?;
        let address = Ipv6Addr::from(raw.sin6_addr.s6_addr);
        Ok(SocketAddrV6::new(address, u16::from_be(raw.sin6_port), 0, raw.sin6_scope_id).into())
    } else {
        let raw = getsockopt(&socket, sockopt::OriginalDst)?;
        Ok(SocketAddrV4::new(u32::from_be(raw.sin_addr.s_addr).into(), u16::from_be(raw.sin_port)).into())
    }
}
