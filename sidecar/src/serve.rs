//! Room `serve`: to be built.
