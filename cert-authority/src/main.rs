//! The command line of the certificate authority.
fn main() {}
