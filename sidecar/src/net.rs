//! Bytes on sockets: one `Stream` for all of them, the original destination of a redirected connection,
//! listeners and dialling, and the two-way copy. Knows nothing of HTTP or identities.

mod copy;
mod half_close;
mod original_destination;
mod reclaim;
mod socket;
mod stream;

pub use copy::{Broken, BrokenSide, copy_both_ways};
pub use half_close::HalfClose;
pub use original_destination::original_destination;
pub use reclaim::{Reclaimer, is_out_of_descriptors};
pub use socket::{dial, listen, listen_shared, reset, set_options};
pub use stream::Stream;
