//! HTTP around hyper: serving a connection, bodies that report how they ended, requests that can be sent again,
//! headers between hops (RFC 9110 7.6), answers of our own, upgrades. hyper does all framing.

mod activity;
pub mod body;
mod buffers;
pub mod headers;
mod observe;
mod received;
mod replay;
mod respond;
mod server;
mod streams;
mod unread;
mod upgrade;
mod upload;
mod waiting;

pub use activity::Activity;
pub use body::{Body, BodyEnd, Ended};
pub use buffers::{BufferBudget, BufferGrant};
pub use observe::{answer_failed, begin_answer, end_answer, end_speaks_against_endpoint};
pub use replay::Replay;
pub use respond::{answer, refuse_stream};
pub use server::{HttpLimits, SIDECAR_FIELDS, Stop, serve};
pub use upgrade::{Upgrade, Upgraded, frame_for_upgrade, left_http, wants_upgrade};
pub use upload::{Sending, is_malformed, upload};
