//! Room `tls`: to be built.
