//! What is spoken on a connection.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What an app speaks, declared by an operator or detected from the first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.0 or HTTP/1.1.
    Http1,
    /// HTTP/2 with prior knowledge, gRPC included.
    #[serde(alias = "grpc")]
    Http2,
    /// The app's own TLS: passed through.
    Tls,
    /// Anything else: bytes.
    #[serde(rename = "tcp")]
    Opaque,
}

impl Protocol {
    /// The name used in configuration, metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Protocol::Http1 => "http1",
            Protocol::Http2 => "http2",
            Protocol::Tls => "tls",
            Protocol::Opaque => "tcp",
        }
    }

    /// The version of HTTP, where it is HTTP.
    pub fn http(self) -> Option<HttpVersion> {
        match self {
            Protocol::Http1 => Some(HttpVersion::Http1),
            Protocol::Http2 => Some(HttpVersion::Http2),
            Protocol::Tls | Protocol::Opaque => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// The two ways HTTP is framed on a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HttpVersion {
    /// HTTP/1.0 or HTTP/1.1 (RFC 9112).
    Http1,
    /// HTTP/2 (RFC 9113).
    Http2,
}
