//! Room `identity`: to be built.
