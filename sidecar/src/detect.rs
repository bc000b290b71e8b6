//! Room `detect`: to be built.
