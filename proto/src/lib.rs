//! The contract between Weft's programs: the gRPC messages, the grammar of SPIFFE ids, and the ports and
//! names that two programs must agree on. It holds no behaviour beyond parsing, but for how all programs write a log and
//! when they renew a certificate.

pub mod certificate;
pub mod lines;
pub mod names;
pub mod schedule;
pub mod spiffe;

/// Messages and services of the certificate authority (`proto/weft/ca/v1/ca.proto`).
#[allow(missing_docs)]
pub mod ca {
    tonic::include_proto!("weft.ca.v1");
}
