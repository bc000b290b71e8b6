//! What strangers send: requests that two parsers could read differently, and floods. Raw sockets into running
//! sidecars in pods, and an app that records the exact bytes it gets.

#[path = "strangers/descriptors.rs"]
mod descriptors;
#[path = "strangers/frames.rs"]
mod frames;
#[path = "strangers/framing.rs"]
mod framing;
#[path = "strangers/heads.rs"]
mod heads;
#[path = "strangers/limits.rs"]
mod limits;
#[path = "strangers/peers.rs"]
mod peers;
#[path = "strangers/uploads.rs"]
mod uploads;
#[path = "strangers/wire.rs"]
mod wire;
