//! Several volumes in one file.

use serde::Deserialize as _;
use serde_yaml_ng::{Deserializer, Value};

use super::VolumeFile;

/// Reads volumes: a list, alone or under `volumes`, or one document each. None at all has to be said.
pub(in crate::cli) fn many(text: &str) -> Result<Vec<VolumeFile>, String> {
    let mut found: Option<Vec<Value>> = None;
    for document in Deserializer::from_str(text) {
        let value = Value::deserialize(document).map_err(|error| error.to_string())?;
        if !value.is_null() {
            found.get_or_insert_default().extend(volumes(value)?);
        }
    }
    let found = found.ok_or("it has no volumes; write volumes: [] if that is meant")?;
    let read = |(n, value): (usize, Value)| {
        let name = value.get("name").and_then(Value::as_str);
        let name = name.map(|name| format!(" ({name})")).unwrap_or_default();
        let volume = serde_yaml_ng::from_value::<VolumeFile>(value);
        volume.map_err(|error| format!("volume {}{name}: {error}", n + 1))
    };
    found.into_iter().enumerate().map(read).collect()
}

/// Those of one document.
fn volumes(document: Value) -> Result<Vec<Value>, String> {
    match document {
        Value::Sequence(volumes) => Ok(volumes),
        Value::Mapping(mut map) if map.contains_key("volumes") => {
            let volumes = map.remove("volumes").unwrap_or_default();
            if let Some(other) = map.keys().next() {
                let other = serde_yaml_ng::to_string(other).unwrap_or_default();
                return Err(format!("{} does not belong beside volumes", other.trim()));
            }
            match volumes {
                Value::Sequence(volumes) => Ok(volumes),
                _ => Err("volumes must be a list, [] for none".into()),
            }
        }
        volume => Ok(vec![volume]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        many(text).unwrap().into_iter().map(|volume| volume.name).collect()
    }

    #[test]
    fn volumes_are_a_list_or_documents() {
        for text in [
            "[{name: a}, {name: b}]",
            "- name: a\n- name: b\n",
            "volumes:\n- name: a\n- {name: b}\n",
            r#"{"volumes": [{"name": "a"}, {"name": "b"}]}"#,
            "name: a\n---\nname: b\n",
            "---\nname: a\n---\n---\nvolumes: [{name: b}]\n",
        ] {
            assert_eq!(names(text), ["a", "b"], "{text}");
        }
        assert_eq!(names("name: a"), ["a"]);
        for text in ["[]", "volumes: []"] {
            assert!(names(text).is_empty(), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("", "no volumes"),
            ("---\n", "no volumes"),
            ("volumes:", "[] for none"),
            ("{volumes: [], kind: List}", "kind does not belong"),
            ("[{name: a}, {name: b, colour: red}]", "volume 2 (b): unknown field `colour`"),
            ("[5]", "volume 1: "),
            ("name: a\n--- {", "did not find"),
        ] {
            let error = many(text).unwrap_err();
            assert!(error.contains(words), "{text}: {error}");
        }
        let error = many("[{name: a, chap: {username: u, password: [hush]}}]").unwrap_err();
        assert!(error.contains("username_in") && !error.contains("hush"), "{error}");
    }
}
