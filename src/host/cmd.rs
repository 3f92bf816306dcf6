//! All programs that lunplug runs, resolved once.
