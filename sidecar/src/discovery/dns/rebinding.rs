//! Answers of other people's name servers that mean this host or a virtual address of ours: with them a foreign name
//! could lead a browser, or any program that believes names, to the app itself or to a service of the mesh (DNS
//! rebinding). Pure. Walks over the records (RFC 1035 4.1.3) without understanding more of them than it must: addresses
//! (A, AAAA) and the hints of HTTPS and SVCB records (RFC 9460 2.2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::discovery::is_virtual;

const A: u16 = 1;
const AAAA: u16 = 28;
const SVCB: u16 = 64;
const HTTPS: u16 = 65;
/// Keys of the parameters of HTTPS and SVCB.
const IPV4_HINT: u16 = 4;
const IPV6_HINT: u16 = 6;

/// May the app have this answer? Not where a record has such an address, nor where the records cannot be walked over:
/// somebody else might find more in them than we.
pub(super) fn is_harmless(answer: &[u8]) -> bool {
    let mut bytes = Bytes { all: answer, at: 0 };
    let is_cut = answer.get(2).is_some_and(|flags| flags & 0b10 != 0);
    // A cut answer (TC) ends anywhere; its client asks again over TCP.
    bytes.records().unwrap_or(is_cut)
}

struct Bytes<'a> {
    all: &'a [u8],
    at: usize,
}

impl<'a> Bytes<'a> {
    /// Is every record harmless? None where the message ends too early, or is none.
    fn records(&mut self) -> Option<bool> {
        self.take(4)?;
        let questions = self.number()?;
        let records = u32::from(self.number()?) + u32::from(self.number()?) + u32::from(self.number()?);
        for _ in 0..questions {
            self.name()?;
            self.take(4)?;
        }
        for _ in 0..records {
            self.name()?;
            let kind = self.number()?;
            self.take(6)?;
            let length = self.number()?;
            let data = self.take(length.into())?;
            if !is_harmless_data(kind, data)? {
                return Some(false);
            }
        }
        Some(true)
    }

    /// Passes over a name: labels up to the root, or up to a pointer.
    fn name(&mut self) -> Option<()> {
        loop {
            match self.take(1)?[0] {
                0 => return Some(()),
                length @ 1..=63 => self.take(length.into())?,
                0xc0.. => return self.take(1).map(drop),
                64..=191 => return None,
            };
        }
    }

    fn number(&mut self) -> Option<u16> {
        Some(u16::from_be_bytes(self.take(2)?.try_into().ok()?))
    }

    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let taken = self.all.get(self.at..self.at.checked_add(count)?)?;
        self.at += count;
        Some(taken)
    }
}

/// None where the data is not what its type says.
fn is_harmless_data(kind: u16, data: &[u8]) -> Option<bool> {
    let are_foreign = |data: &[u8], width: usize| -> Option<bool> {
        let parts = data.chunks(width).map(|part| Some(is_foreign(address(part)?)));
        parts.collect::<Option<Vec<bool>>>().map(|all| all.into_iter().all(|foreign| foreign))
    };
    match kind {
        A if data.len() == 4 => are_foreign(data, 4),
        AAAA if data.len() == 16 => are_foreign(data, 16),
        A | AAAA => None,
        SVCB | HTTPS => {
            let mut bytes = Bytes { all: data, at: 2 };
            bytes.name()?;
            while bytes.at < data.len() {
                let (key, length) = (bytes.number()?, bytes.number()?);
                let value = bytes.take(length.into())?;
                let foreign = match key {
                    IPV4_HINT => are_foreign(value, 4)?,
                    IPV6_HINT => are_foreign(value, 16)?,
                    _ => true,
                };
                if !foreign {
                    return Some(false);
                }
            }
            Some(true)
        }
        _ => Some(true),
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(<[u8; 4]>::try_from(bytes).ok()?).into()),
        16 => Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()),
        _ => None,
    }
}

/// Neither this host (127.0.0.0/8, 0.0.0.0/8, ::1, ::) nor a virtual address (240.0.0.0/4), also not in the IPv6
/// spellings of IPv4 (RFC 4291 2.5.5).
fn is_foreign(ip: IpAddr) -> bool {
    let ip = match ip {
        IpAddr::V6(six) if six.is_loopback() || six.is_unspecified() => return false,
        IpAddr::V6(six) => six.to_ipv4().map_or(ip, IpAddr::V4),
        IpAddr::V4(_) => ip,
    };
    let is_here = matches!(ip, IpAddr::V4(four) if four.is_loopback() || four.octets()[0] == 0);
    !is_here && !is_virtual(ip)
}

#[cfg(test)]
mod tests {
    use hickory_proto::{
        op::{Message, OpCode, Query},
        rr::{
            Name, RData, Record, RecordType,
            rdata::{self, HTTPS, SVCB, svcb},
        },
    };

    use super::*;

    fn name() -> Name {
        Name::from_ascii("evil.example.").unwrap()
    }

    fn answer(data: &[RData]) -> Vec<u8> {
        let mut message = Message::response(7, OpCode::Query);
        message.add_query(Query::query(name(), RecordType::A));
        for data in data {
            message.add_answer(Record::from_rdata(name(), 60, data.clone()));
        }
        message.to_vec().unwrap()
    }

    fn of(address: &str) -> RData {
        match address.parse().unwrap() {
            IpAddr::V4(four) => RData::A(rdata::A(four)),
            IpAddr::V6(six) => RData::AAAA(rdata::AAAA(six)),
        }
    }

    #[test]
    fn addresses_of_this_host_and_of_the_mesh_are_found() {
        for (address, expected) in [
            ("192.0.2.7", true),
            ("10.0.0.1", true),
            ("169.254.169.254", true),
            ("239.255.255.255", true),
            ("127.0.0.1", false),
            ("127.255.255.254", false),
            ("0.0.0.0", false),
            ("0.1.2.3", false),
            ("240.0.0.1", false),
            ("255.255.255.255", false),
            ("2001:db8::1", true),
            ("::ffff:10.0.0.1", true),
            ("::1", false),
            ("::", false),
            ("::ffff:127.0.0.1", false),
            ("::ffff:240.1.2.3", false),
            ("::127.0.0.1", false),
        ] {
            assert_eq!(is_harmless(&answer(&[of(address)])), expected, "{address}");
            // One among others is enough.
            let among = answer(&[of("192.0.2.1"), RData::CNAME(rdata::CNAME(name())), of(address)]);
            assert_eq!(is_harmless(&among), expected, "{address} among others");
        }
        assert!(is_harmless(&answer(&[])));
    }

    #[test]
    fn hints_and_all_sections_count() {
        let hints = |address: [u8; 4]| {
            let hint = svcb::SvcParamValue::Ipv4Hint(svcb::IpHint(vec![rdata::A(address.into())]));
            SVCB::new(1, Name::root(), vec![(svcb::SvcParamKey::Ipv4Hint, hint)])
        };
        for (address, expected) in [([192, 0, 2, 1], true), ([127, 0, 0, 1], false)] {
            assert_eq!(is_harmless(&answer(&[RData::HTTPS(HTTPS(hints(address)))])), expected);
            assert_eq!(is_harmless(&answer(&[RData::SVCB(hints(address))])), expected);
        }
        let mut message = Message::response(7, OpCode::Query);
        message.add_additional(Record::from_rdata(name(), 60, of("127.0.0.1")));
        assert!(!is_harmless(&message.to_vec().unwrap()));
    }

    #[test]
    fn what_cannot_be_walked_over_is_not_let_through() {
        let good = answer(&[of("192.0.2.1"), of("192.0.2.2")]);
        for length in 0..good.len() {
            let mut part = good[..length].to_vec();
            assert!(!is_harmless(&part), "{length}");
            if length > 2 {
                part[2] |= 0b10;
                assert!(is_harmless(&part), "{length}, and said to be cut");
            }
        }
        let mut random = fastrand::Rng::with_seed(4);
        for _ in 0..50_000 {
            let mut bytes = good.clone();
            for _ in 0..random.usize(1..5) {
                let at = random.usize(..bytes.len());
                bytes[at] = random.u8(..);
            }
            let _ = is_harmless(&bytes);
        }
    }
}
