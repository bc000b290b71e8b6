//! What a redirect is made from: ports, users, and what to leave alone. As used: complete, nothing optional.
//! Parsing refuses what iptables would read differently. It knows nothing of rules.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

use weft_proto::names;

/// The port of DNS.
pub(super) const DNS: u16 = 53;

/// What to redirect, and what not. An empty `include_*` list means everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The user of the sidecar: its own connections are not redirected.
    pub sidecar_uid: u32,
    /// Where connections of the app go, on loopback.
    pub outbound_port: u16,
    /// Where connections from other hosts go.
    pub inbound_port: u16,
    /// Probes and metrics: never redirected.
    pub admin_port: u16,
    /// Where DNS of the app goes, on loopback.
    pub dns_port: u16,
    /// Redirect only connections of the app to these ports.
    pub include_outbound_ports: Vec<PortRange>,
    /// Leave connections of the app to these ports alone.
    pub exclude_outbound_ports: Vec<PortRange>,
    /// Redirect only connections of the app to these networks.
    pub include_outbound_networks: Vec<Network>,
    /// Leave connections of the app to these networks alone.
    pub exclude_outbound_networks: Vec<Network>,
    /// Leave everything that these users send alone, DNS included.
    pub exclude_uids: Vec<u32>,
    /// Redirect only connections from outside to these ports.
    pub include_inbound_ports: Vec<PortRange>,
    /// Leave connections from outside to these ports alone.
    pub exclude_inbound_ports: Vec<PortRange>,
    /// Redirect DNS (UDP and TCP port 53).
    pub dns: bool,
    /// Redirect IPv6 too. Without it IPv6 passes the sidecar by.
    pub ipv6: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            sidecar_uid: names::SIDECAR_UID,
            outbound_port: names::OUTBOUND_PORT,
            inbound_port: names::INBOUND_PORT,
            admin_port: names::ADMIN_PORT,
            dns_port: names::DNS_PORT,
            include_outbound_ports: Vec::new(),
            exclude_outbound_ports: Vec::new(),
            include_outbound_networks: Vec::new(),
            exclude_outbound_networks: Vec::new(),
            exclude_uids: Vec::new(),
            include_inbound_ports: Vec::new(),
            exclude_inbound_ports: Vec::new(),
            dns: true,
            ipv6: true,
        }
    }
}

impl Settings {
    /// Every mistake in these settings, each with its way out; none if they can be planned.
    pub fn mistakes(&self) -> Vec<String> {
        let mut mistakes = Vec::new();
        let ports = [
            ("outbound port", self.outbound_port),
            ("inbound port", self.inbound_port),
            ("admin port", self.admin_port),
            ("DNS port", self.dns_port),
        ];
        for (at, (name, port)) in ports.iter().enumerate() {
            if *port == 0 {
                mistakes.push(format!("the {name} is 0; expected a port from 1 to 65535"));
            }
            if let Some((other, _)) = ports[..at].iter().find(|(_, used)| used == port) {
                mistakes.push(format!("the {name} and the {other} are both {port}; give each its own"));
            }
        }
        if self.sidecar_uid == 0 {
            mistakes.push(
                "the sidecar's user is 0: nothing that root sends would be redirected; \
                 run the sidecar as a user of its own, 1337 by default"
                    .to_owned(),
            );
        }
        if self.dns && self.exclude_outbound_ports.iter().any(|range| range.contains(DNS)) {
            mistakes.push(
                "outbound port 53 is excluded while DNS is redirected; turn the redirect of DNS off instead"
                    .to_owned(),
            );
        }
        mistakes
    }
}

/// Ports from first to last, both included. Written `8080` or `8000-8999`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortRange {
    first: u16,
    last: u16,
}

impl PortRange {
    /// Is this port in the range?
    pub fn contains(self, port: u16) -> bool {
        (self.first..=self.last).contains(&port)
    }

    /// The lowest port of the range.
    pub fn first(self) -> u16 {
        self.first
    }

    /// As iptables writes it: `8080` or `8000:8999`.
    pub(super) fn in_a_rule(self) -> String {
        if self.first == self.last { self.first.to_string() } else { format!("{}:{}", self.first, self.last) }
    }
}

impl FromStr for PortRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is no port; expected one such as 8080, or a range such as 8000-8999");
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let port = |part: &str| part.parse::<u16>().ok().filter(|port| *port > 0).ok_or_else(wrong);
        let (first, last) = (port(first)?, port(last)?);
        if first > last {
            return Err(format!("the range `{text}` ends before it begins; expected {last}-{first}"));
        }
        Ok(PortRange { first, last })
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(to, "{}", self.first)
        } else {
            write!(to, "{}-{}", self.first, self.last)
        }
    }
}

/// A network in CIDR notation (RFC 4632, RFC 4291): `10.0.0.0/8`, `fd00::/8`, or one address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    address: IpAddr,
    prefix: u8,
}

impl Network {
    /// The lowest address.
    pub fn address(self) -> IpAddr {
        self.address
    }

    /// An address inside that is no network address where the network has room.
    pub(super) fn some_address(self) -> IpAddr {
        match self.address {
            IpAddr::V4(address) if self.prefix < 31 => Ipv4Addr::from(u32::from(address) | 1).into(),
            IpAddr::V6(address) if self.prefix < 127 => {
                std::net::Ipv6Addr::from(u128::from(address) | 1).into()
            }
            address => address,
        }
    }

    fn without_host_part(self) -> IpAddr {
        let keep = u32::from(self.prefix);
        match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - keep).unwrap_or(0);
                Ipv4Addr::from(u32::from(address) & mask).into()
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - keep).unwrap_or(0);
                std::net::Ipv6Addr::from(u128::from(address) & mask).into()
            }
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is no network; expected one such as 10.0.0.0/8 or fd00::/8, or a single address"
            )
        };
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(prefix) => prefix.parse().ok().filter(|bits| *bits <= longest).ok_or_else(wrong)?,
            None => longest,
        };
        let network = Network { address, prefix };
        let lowest = network.without_host_part();
        if lowest != address {
            return Err(format!("`{text}` has bits beyond its prefix; expected {lowest}/{prefix}"));
        }
        Ok(network)
    }
}

impl fmt::Display for Network {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}/{}", self.address, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_networks_are_read_or_refused_with_the_way_out() {
        for (text, rule) in [("8080", "8080"), ("8000-8999", "8000:8999"), ("1-65535", "1:65535")] {
            let range: PortRange = text.parse().unwrap();
            assert_eq!((range.in_a_rule().as_str(), range.to_string().as_str()), (rule, text));
        }
        for text in ["0", "", "-", "80-", "70000", "80:90", " 80", "1-2-3"] {
            assert!(text.parse::<PortRange>().unwrap_err().contains("is no port"), "{text}");
        }
        assert!("90-80".parse::<PortRange>().unwrap_err().contains("80-90"));
        for text in ["10.0.0.0/8", "0.0.0.0/0", "192.0.2.1/32", "fd00::/8", "::/0", "::1/128"] {
            assert_eq!(text.parse::<Network>().unwrap().to_string(), text);
        }
        assert_eq!("10.1.2.3".parse::<Network>().unwrap().to_string(), "10.1.2.3/32");
        assert!("10.1.2.3/8".parse::<Network>().unwrap_err().contains("10.0.0.0/8"));
        for text in ["10.0.0.0/33", "fd00::/129", "ten/8", "10.0.0.0/", "10.0.0/8", "10.0.0.0/8/8", "-j DROP"]
        {
            assert!(text.parse::<Network>().unwrap_err().contains("is no network"), "{text}");
        }
    }

    #[test]
    fn an_address_inside_a_network() {
        for (network, address) in
            [("10.0.0.0/8", "10.0.0.1"), ("192.0.2.7/32", "192.0.2.7"), ("fd00::/8", "fd00::1")]
        {
            let network: Network = network.parse().unwrap();
            assert_eq!(network.some_address().to_string(), address);
        }
    }

    #[test]
    fn all_mistakes_are_found_at_once() {
        assert!(Settings::default().mistakes().is_empty());
        let settings = Settings {
            sidecar_uid: 0,
            inbound_port: 15001,
            admin_port: 0,
            exclude_outbound_ports: vec!["50-60".parse().unwrap()],
            ..Settings::default()
        };
        let mistakes = settings.mistakes().join("\n");
        for part in ["both 15001", "admin port is 0", "user is 0", "port 53"] {
            assert!(mistakes.contains(part), "{part} in {mistakes}");
        }
    }
}
