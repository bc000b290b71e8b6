//! Who is where. Sources (files, Consul) publish an immutable [`Directory`] of services; one that must be asked by
//! name is asked through [`Registry`]. `virtual_addresses` gives services addresses that apps can dial, and `dns`
//! hands them out. Where a destination leads is decided by its address alone, never by what the app says inside
//! the connection.

pub mod consul;
mod directory;
pub mod dns;
pub mod file;
mod files;
mod folder;
pub mod policies;
pub mod publish;
mod registry;
mod service_document;
mod virtual_addresses;

pub use directory::{Destination, Directory};
pub use registry::{Asked, Interest, Registry};
pub use service_document::mistakes_in;
pub use virtual_addresses::{VirtualAddresses, is_virtual};
