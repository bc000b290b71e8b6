//! Who is where. Sources (files now) publish an immutable [`Directory`] of services; `virtual_addresses` gives
//! services addresses that apps can dial, and `dns` hands them out. Where a destination leads is decided by its
//! address alone, never by what the app says inside the connection.

mod directory;
pub mod dns;
pub mod file;
mod files;
mod folder;
pub mod policies;
pub mod publish;
mod service_document;
mod virtual_addresses;

pub use directory::{Destination, Directory};
pub use service_document::mistakes_in;
pub use virtual_addresses::{VirtualAddresses, is_virtual};
