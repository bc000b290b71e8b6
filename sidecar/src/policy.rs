//! Room `policy`: to be built.
