//! Room `http`: to be built.
