//! Reads the ClientHello of TLS (RFC 8446 4.1.2): the server name (RFC 6066 3) and the application protocols
//! (RFC 7301) that a client asks for. rustls parses; nothing is answered, and the bytes stay with the caller.

use std::io::Cursor;

use rustls::server::Acceptor;

/// The longest ClientHello that is read, in bytes on the wire.
pub const HELLO_BYTES: usize = 16 * 1024;

/// What the first bytes of a connection say about TLS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Hello {
    /// The ClientHello is not complete yet.
    NeedMore,
    /// No ClientHello, one that is malformed (RFC 8446 requires `signature_algorithms`), or a longer one than
    /// [`HELLO_BYTES`].
    NotTls,
    /// A whole ClientHello.
    Parsed {
        /// The host name asked for, in lowercase; none where there is none or it is an IP address.
        sni: Option<String>,
        /// The application protocols offered, in the client's order.
        alpn: Vec<Vec<u8>>,
    },
}

/// Reads the ClientHello at the start of `bytes`; what follows it is ignored.
pub fn client_hello(bytes: &[u8]) -> Hello {
    HelloReader::default().read(bytes)
}

/// Reads a ClientHello that comes in pieces, each byte once: a client that sends it byte by byte costs no more than one
/// that sends it at once.
#[derive(Default)]
pub struct HelloReader {
    acceptor: Acceptor,
    /// Bytes that it has looked at.
    read: usize,
}

impl HelloReader {
    /// Goes on where it stopped. `bytes` are all so far; not to be asked again after another answer than
    /// [`Hello::NeedMore`].
    pub fn read(&mut self, bytes: &[u8]) -> Hello {
        let end = bytes.len().min(HELLO_BYTES);
        let mut unread = Cursor::new(&bytes[self.read.min(end)..end]);
        self.read = end;
        loop {
            match self.acceptor.read_tls(&mut unread) {
                Ok(0) if end == HELLO_BYTES => return Hello::NotTls,
                Ok(0) => return Hello::NeedMore,
                Ok(_) => {}
                Err(_) => return Hello::NotTls,
            }
            match self.acceptor.accept() {
                Ok(None) => {}
                Ok(Some(accepted)) => {
                    let hello = accepted.client_hello();
                    return Hello::Parsed {
                        sni: hello.server_name().map(str::to_ascii_lowercase),
                        alpn: hello.alpn().into_iter().flatten().map(<[u8]>::to_vec).collect(),
                    };
                }
                Err(_) => return Hello::NotTls,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use rustls::{ClientConfig, ClientConnection, RootCertStore, pki_types::ServerName};

    use super::*;

    /// What a real client sends first.
    pub(crate) fn hello_of(name: &str, alpn: &[&[u8]]) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let mut connection = ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        connection.write_tls(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn name_and_protocols_are_read_and_every_prefix_asks_for_more() {
        let bytes = hello_of("Orders.example", &[b"h2", b"http/1.1"]);
        for length in 0..bytes.len() {
            assert_eq!(client_hello(&bytes[..length]), Hello::NeedMore, "{length} of {}", bytes.len());
        }
        let expected = Hello::Parsed {
            sni: Some("orders.example".into()),
            alpn: vec![b"h2".to_vec(), b"http/1.1".to_vec()],
        };
        assert_eq!(client_hello(&bytes), expected);
        assert_eq!(client_hello(&[bytes, vec![0xff; 99]].concat()), expected);
    }

    #[test]
    fn what_comes_in_pieces_is_read_once() {
        let bytes = hello_of("orders.example", &[b"weft-h2"]);
        let mut reader = HelloReader::default();
        let mut so_far = Vec::new();
        for byte in &bytes[..bytes.len() - 1] {
            so_far.push(*byte);
            assert_eq!(reader.read(&so_far), Hello::NeedMore);
            // what was read is not looked at again
            so_far.fill(0);
        }
        so_far.extend(bytes.last());
        assert!(matches!(reader.read(&so_far), Hello::Parsed { alpn, .. } if alpn == [b"weft-h2"]));
    }

    #[test]
    fn neither_name_nor_protocols_are_needed() {
        let bytes = hello_of("127.0.0.1", &[]);
        assert_eq!(client_hello(&bytes), Hello::Parsed { sni: None, alpn: vec![] });
    }

    #[test]
    fn what_is_no_hello_is_said_to_be_none() {
        for bytes in
            [&b"GET / HTTP/1.1\r\n\r\n"[..], &[22, 3, 1, 0, 5, 1, 0, 0, 1, 0], &[21, 3, 3, 0, 2, 2, 40]]
        {
            assert_eq!(client_hello(bytes), Hello::NotTls, "{bytes:?}");
        }
        let mut endless = vec![22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff];
        endless.resize(HELLO_BYTES, 0);
        assert_eq!(client_hello(&endless), Hello::NotTls);
    }

    #[test]
    fn a_damaged_hello_does_no_harm() {
        let bytes = hello_of("orders.example", &[b"h2"]);
        let mut random = fastrand::Rng::with_seed(11);
        for _ in 0..2_000 {
            let mut damaged = bytes.clone();
            for _ in 0..random.usize(1..4) {
                let at = random.usize(..damaged.len());
                damaged[at] = random.u8(..);
            }
            client_hello(&damaged);
        }
    }
}
