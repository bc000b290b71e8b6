//! Room `connect`: to be built.
