//! The resolvers of the host, from the text of `/etc/resolv.conf` (resolv.conf(5)). Search domains and options
//! are the client's own business.

use std::net::{IpAddr, SocketAddr};

use crate::discovery::is_virtual;

/// resolv.conf(5): at most `MAXNS` name servers are asked.
const MAX_RESOLVERS: usize = 3;
const PORT: u16 = 53;

/// The name servers of a `resolv.conf`, in its order. Lines that are no address of a possible resolver are passed
/// over, as the C library does.
pub fn resolvers(resolv_conf: &str) -> Vec<SocketAddr> {
    resolv_conf
        .lines()
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace();
            (words.next() == Some("nameserver")).then(|| words.next())?
        })
        .filter_map(|word| word.parse::<IpAddr>().ok())
        .filter(|address| !is_virtual(*address) && !address.is_multicast())
        .map(|address| SocketAddr::new(address, PORT))
        .take(MAX_RESOLVERS)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_the_c_library_does() {
        let text = "# nameserver 10.0.0.9\nsearch a.example\nnameserver 10.0.0.1\n\tnameserver\t::1 # two\n\
                    nameserver nowhere\nnameserver\nnameserver 240.0.0.1\nnameservers 10.0.0.8\n\
                    options ndots:5\nnameserver 10.0.0.2\nnameserver 10.0.0.3\n";
        let expected: Vec<SocketAddr> =
            ["10.0.0.1:53", "[::1]:53", "10.0.0.2:53"].map(|text| text.parse().unwrap()).into();
        assert_eq!(resolvers(text), expected);
        assert_eq!(resolvers(""), []);
    }
}
