//! Who is believed, and who reaches what: hostile peers, real sidecars in pods. docs/security.md points here.

#[path = "trust/capture.rs"]
mod capture;
#[path = "trust/change.rs"]
mod change;
#[path = "trust/claims.rs"]
mod claims;
#[path = "trust/reach.rs"]
mod reach;
#[path = "trust/refusals.rs"]
mod refusals;
#[path = "trust/scene.rs"]
mod scene;
