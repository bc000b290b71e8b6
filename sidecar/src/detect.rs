//! What does a client speak? `classify` looks at the first bytes and nothing else; `client_hello` reads the name
//! and the protocols that a TLS client asks for; `read_ahead` reads a stream until that is known and puts the
//! bytes back. Nothing is answered or changed here, and nobody is believed: a server still parses every byte.

mod classify;
mod client_hello;
mod first_to_speak;
mod read_ahead;

pub use classify::{LOOK, Verdict, classify, may_be_tls};
pub use client_hello::{HELLO_BYTES, Hello, HelloReader, client_hello};
pub use first_to_speak::{FirstToSpeak, client_speaks, first_to_speak, server_speaks};
pub use read_ahead::{Heard, ReadAhead, read_ahead};
