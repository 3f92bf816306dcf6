//! How the configuration's layers are put on top of each other.

use std::io;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::Config;

/// The file that is read when no other is named.
pub const DEFAULT_PATH: &str = "/etc/lunplug/lunplugd.toml";

/// What an environment variable begins with.
const PREFIX: &str = "LUNPLUG_";

/// Variables that are not keys: the file's path, and what the command line tool reads.
const NOT_KEYS: &[&str] = &["LUNPLUG_CONFIG", "LUNPLUG_NAMESPACE", "LUNPLUG_OUTPUT"];

/// The configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("cannot read configuration {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The file is wrong at that line.
    #[error("{path}:{line}: {message}")]
    File {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong, with the key.
        message: String,
    },
    /// A variable or flag is wrong.
    #[error("{origin}: {message}")]
    Override {
        /// Where it was given: the variable or flag.
        origin: String,
        /// What is wrong.
        message: String,
    },
    /// Values do not fit.
    #[error("configuration key {key}: {message}")]
    Value {
        /// The key.
        key: &'static str,
        /// What is wrong.
        message: String,
    },
}

/// The layers, the lowest first.
#[derive(Debug, Clone, Default)]
pub struct Layers {
    /// The file's path and text, where there is one.
    pub file: Option<(PathBuf, String)>,
    /// The environment; variables of others are passed over.
    pub environment: Vec<(String, String)>,
    /// From flags: what it was, the key and the value.
    pub flags: Vec<(String, String, String)>,
}

/// A configuration, and what was noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// What is in force.
    pub config: Config,
    /// Things to warn of.
    pub warnings: Vec<String>,
}

impl Layers {
    /// Takes the file named, which must exist, or else the default one, which need not; and the
    /// process's environment. Blocks for a moment; meant for start-up.
    pub fn from_system(
        file: Option<&Path>,
        flags: Vec<(String, String, String)>,
    ) -> Result<Self, Error> {
        let path = file.unwrap_or(Path::new(DEFAULT_PATH));
        let file = match std::fs::read_to_string(path) {
            Ok(text) => Some((path.to_owned(), text)),
            Err(error) if file.is_none() && error.kind() == io::ErrorKind::NotFound => None,
            Err(source) => return Err(Error::Read { path: path.into(), source }),
        };
        let utf8 = |s: std::ffi::OsString| s.to_string_lossy().into_owned();
        let environment = std::env::vars_os().map(|(k, v)| (utf8(k), utf8(v))).collect();
        Ok(Self { file, environment, flags })
    }

    /// Puts them together.
    pub fn load(self) -> Result<Loaded, Error> {
        let mut warnings = Vec::new();
        let mut table = match &self.file {
            Some((path, text)) => table_of(path, text)?,
            None => Table::new(),
        };
        let keys = keys();
        for (variable, value) in self.environment {
            if !variable.starts_with(PREFIX) || NOT_KEYS.contains(&variable.as_str()) {
                continue;
            }
            match keys.iter().find(|(key, _)| variable_of(key) == variable) {
                Some((key, like)) => put(&mut table, &variable, key, &value, like)?,
                // Not an error: Kubernetes itself sets LUNPLUG_SERVICE_HOST and the like in every
                // pod beside a Service of that name.
                None => warnings.push(format!("{variable} names no configuration key: ignored")),
            }
        }
        for (flag, key, value) in self.flags {
            match keys.iter().find(|(known, _)| *known == key) {
                Some((_, like)) => put(&mut table, &flag, &key, &value, like)?,
                None => {
                    let message = format!("there is no configuration key {key:?}");
                    return Err(Error::Override { origin: flag, message });
                }
            }
        }
        let config: Config = Value::Table(table).try_into().map_err(|error: toml::de::Error| {
            Error::Override { origin: "configuration".into(), message: one_line(error.message()) }
        })?;
        config.check().map_err(|(key, message)| Error::Value { key, message })?;
        Ok(Loaded { config, warnings })
    }
}

/// Every key with its default, in dotted form.
pub(super) fn keys() -> Vec<(String, Value)> {
    let defaults = Table::try_from(Config::default()).expect("the defaults are plain values");
    let mut keys = Vec::new();
    for (name, value) in defaults {
        match value {
            Value::Table(section) => {
                keys.extend(
                    section.into_iter().map(|(key, value)| (format!("{name}.{key}"), value)),
                );
            }
            value => keys.push((name, value)),
        }
    }
    keys
}

/// The environment variable of a key.
fn variable_of(key: &str) -> String {
    format!("{PREFIX}{}", key.replace('.', "_").to_ascii_uppercase())
}

/// Reads the file on its own first, so that an error knows its line.
fn table_of(path: &Path, text: &str) -> Result<Table, Error> {
    let wrong = |error: toml::de::Error| {
        let at = error.span().map_or(0, |span| span.start);
        let line = 1 + text.bytes().take(at).filter(|&b| b == b'\n').count();
        Error::File { path: path.into(), line, message: one_line(error.message()) }
    };
    toml::from_str::<Config>(text).map_err(wrong)?;
    toml::from_str(text).map_err(wrong)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Sets one key from text, read as its default's kind of value, and checks the result.
fn put(table: &mut Table, origin: &str, key: &str, text: &str, like: &Value) -> Result<(), Error> {
    let wrong = |message| Error::Override { origin: origin.into(), message };
    let value = value_of(text, like).map_err(wrong)?;
    match key.split_once('.') {
        Some((section, key)) => {
            let section = table
                .entry(section)
                .or_insert_with(|| Value::Table(Table::new()))
                .as_table_mut()
                .expect("the file was read as a Config, so this is a section");
            section.insert(key.into(), value);
        }
        None => {
            table.insert(key.into(), value);
        }
    }
    Value::Table(table.clone())
        .try_into::<Config>()
        .map(drop)
        .map_err(|error: toml::de::Error| wrong(one_line(error.message())))
}

fn value_of(text: &str, like: &Value) -> Result<Value, String> {
    let number = |text: &str| {
        let text = text.trim();
        text.parse().map(Value::Integer).map_err(|_| format!("{text:?} is not a whole number"))
    };
    match like {
        Value::Integer(_) => number(text),
        Value::Boolean(_) => {
            let yes_or_no = text.trim().parse().map(Value::Boolean);
            yes_or_no.map_err(|_| format!("{text:?} is neither true nor false"))
        }
        // The only lists are of numbers and of absolute paths.
        Value::Array(_) => {
            let items = text.split(',').filter(|item| !item.trim().is_empty());
            let item = |item: &str| match item.trim() {
                path if path.starts_with('/') => Ok(Value::String(path.into())),
                other => number(other),
            };
            items.map(item).collect::<Result<_, _>>().map(Value::Array)
        }
        _ => Ok(Value::String(text.into())),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{GuestUnproven, LogFormat};
    use super::*;
    use crate::connector::settings::WithoutIdentity;

    fn file(text: &str) -> Layers {
        Layers { file: Some(("f.toml".into(), text.into())), ..Layers::default() }
    }

    fn error(layers: Layers) -> String {
        layers.load().unwrap_err().to_string()
    }

    #[test]
    fn flags_win_over_environment_over_file_over_defaults() {
        let mut layers = file("state_dir = '/file'\nrun_dir = '/file'\nkubelet_root = '/file'");
        for key in ["LUNPLUG_RUN_DIR", "LUNPLUG_KUBELET_ROOT"] {
            layers.environment.push((key.into(), "/environment".into()));
        }
        layers.flags.push(("--kubelet-root".into(), "kubelet_root".into(), "/flag".into()));
        let config = layers.load().unwrap().config;
        assert_eq!(config.state_dir, Path::new("/file"));
        assert_eq!(config.run_dir, Path::new("/environment"));
        assert_eq!(config.kubelet_root, Path::new("/flag"));
        assert_eq!(config.limits, Config::default().limits);
    }

    #[test]
    fn every_kind_of_value_can_come_from_the_environment() {
        let layers = Layers {
            environment: [
                ("LUNPLUG_ALLOWED_UIDS", "107, 1000"),
                ("LUNPLUG_LOG_FORMAT", "json"),
                ("LUNPLUG_LOCAL_BLOCK_ROOTS", "/dev, /srv/block"),
                ("LUNPLUG_LOCAL_WITHOUT_IDENTITY", "path"),
                ("LUNPLUG_GUEST_UNPROVEN", "allow"),
                ("LUNPLUG_DEADLINES_GUEST_UNPLUG", "1m 30s"),
                ("LUNPLUG_LIMITS_MAX_VMS", "7"),
                ("LUNPLUG_EXPAND_AUTO", "true"),
                ("LUNPLUG_SERVICE_HOST", "10.0.0.1"),
                ("PATH", "/bin"),
            ]
            .map(|(k, v)| (k.into(), v.into()))
            .into(),
            ..Layers::default()
        };
        let Loaded { config, warnings } = layers.load().unwrap();
        assert_eq!(config.allowed_uids, [107, 1000]);
        assert_eq!(config.local.block_roots, [Path::new("/dev"), Path::new("/srv/block")]);
        assert_eq!(config.local.without_identity, WithoutIdentity::Path);
        assert_eq!(config.log.format, LogFormat::Json);
        assert_eq!(config.guest_unproven, GuestUnproven::Allow);
        assert_eq!(config.deadlines.guest_unplug, Duration::from_secs(90));
        assert_eq!(config.limits.max_vms, 7);
        assert!(config.expand.auto);
        assert_eq!(warnings, ["LUNPLUG_SERVICE_HOST names no configuration key: ignored"]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        let text = error(file("run_dir = '/r'\n\n[log]\nlevle = 'info'\n"));
        assert!(text.starts_with("f.toml:4: unknown field `levle`"), "{text}");
        let text = error(file("[deadlines]\nattach = '0s'"));
        assert!(text.starts_with("f.toml:2: duration \"0s\" is malformed"), "{text}");
        let text = error(file("nonsense"));
        assert!(text.starts_with("f.toml:1: "), "{text}");
        let text = error(Layers {
            environment: vec![("LUNPLUG_LIMITS_MAX_VMS".into(), "many".into())],
            ..Layers::default()
        });
        assert_eq!(text, "LUNPLUG_LIMITS_MAX_VMS: \"many\" is not a whole number");
        let flag = |key: &str, value: &str| Layers {
            flags: vec![("--set".into(), key.into(), value.into())],
            ..Layers::default()
        };
        let text = error(flag("expand.auto", "yes"));
        assert_eq!(text, "--set: \"yes\" is neither true nor false");
        assert_eq!(error(flag("colour", "red")), "--set: there is no configuration key \"colour\"");
        let text = error(flag("guest_unproven", "maybe"));
        assert!(text.starts_with("--set: unknown variant `maybe`, expected"), "{text}");
    }

    #[test]
    fn values_that_do_not_fit_are_refused() {
        for (text, key) in [
            ("run_dir = 'here'", "run_dir"),
            ("metrics_listen = 'localhost'", "metrics_listen"),
            ("socket = 'here'", "socket"),
            ("allowed_uids = [65534]", "allowed_uids"),
            ("[local]\nblock_roots = ['dev']", "local.block_roots"),
            ("[local]\nblock_roots = ['/dev/../etc']", "local.block_roots"),
            ("[local]\nfile_roots = ['srv']", "local.file_roots"),
            ("[limits]\nmax_vms = 0", "limits.max_vms"),
            ("[log]\nlevel = 'lunplug=loud'", "log.level"),
        ] {
            match file(text).load().unwrap_err() {
                Error::Value { key: found, .. } => assert_eq!(found, key),
                other => panic!("{text}: {other}"),
            }
        }
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        let mut config = Config::default();
        config.resolve(Some(&"ns/vm".parse().unwrap()), "host\n");
        assert_eq!(config.socket, Path::new("/run/lunplug/ns_vm.sock"));
        assert_eq!(config.node_name, "host");
        let text = toml::to_string(&config).unwrap();
        assert_eq!(file(&text).load().unwrap().config, config, "{text}");
    }

    #[test]
    fn the_shipped_file_documents_every_key_with_its_default() {
        let text = include_str!("../../dist/lunplugd.toml");
        assert_eq!(file(text).load().unwrap().config, Config::default());
        // Every key stands there as a comment; switched on, the file says the same.
        let switched_on: String = text
            .lines()
            .filter_map(|line| match line.strip_prefix("#") {
                Some(key) if key.starts_with(|c: char| c.is_ascii_lowercase()) => Some(key),
                Some(_) => None,
                None => Some(line),
            })
            .flat_map(|line| [line, "\n"])
            .collect();
        assert_eq!(file(&switched_on).load().unwrap().config, Config::default());
        let table: Table = toml::from_str(&switched_on).unwrap();
        for (key, _) in keys() {
            let found = match key.split_once('.') {
                Some((section, key)) => table.get(section).and_then(|s| s.get(key)),
                None => table.get(&key),
            };
            assert!(found.is_some(), "dist/lunplugd.toml does not document {key}");
        }
    }
}
