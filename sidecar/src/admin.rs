//! Room `admin`: to be built.
