//! The documents against the code and each other.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use lunplug::api::status;
use lunplug::cli::Exit;
use lunplug::reason::Reason;

/// A gRPC code as specifications write it.
fn code_name(code: tonic::Code) -> String {
    let mut name = String::new();
    for c in format!("{code:?}").chars() {
        if c.is_uppercase() && !name.is_empty() {
            name.push('_');
        }
        name.push(c.to_ascii_uppercase());
    }
    name
}

#[test]
fn every_reason_has_its_section_and_every_section_its_reason() {
    let text = include_str!("../docs/errors.md");
    let sections: BTreeMap<&str, String> = text
        .split("\n## ")
        .skip(1)
        .map(|section| section.split_once('\n').unwrap())
        .map(|(code, body)| (code, body.split_whitespace().collect::<Vec<_>>().join(" ")))
        .collect();
    for &reason in Reason::ALL {
        let code = reason.code();
        let body = sections.get(code).unwrap_or_else(|| panic!("docs/errors.md lacks ## {code}"));
        let passes = if reason.is_transient() { ", passes" } else { "" };
        let kind = format!(
            "*({}, exit code {}{passes})*",
            code_name(status::code(reason)),
            Exit::from(reason.kind()) as u8
        );
        assert!(body.contains(&kind), "{code} should have {kind}, and has: {body}");
        let remedy = format!("**What to do:** {}", reason.remedy());
        assert!(body.contains(&remedy), "{code} should have {remedy}, and has: {body}");
    }
    for code in sections.keys() {
        assert!(Reason::from_code(code).is_some(), "docs/errors.md has {code}, which is no reason");
    }
}

/// A heading's anchor, as forges make it.
fn anchor(heading: &str) -> String {
    let kept = heading.to_lowercase().replace(' ', "-");
    kept.chars().filter(|c| c.is_alphanumeric() || *c == '-' || *c == '_').collect()
}

fn anchors(text: &str) -> Vec<String> {
    text.lines()
        .filter(|l| l.starts_with('#'))
        .map(|l| anchor(l.trim_matches(['#', ' '])))
        .collect()
}

#[test]
fn links_lead_somewhere() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let adr = std::fs::read_dir(root.join("docs/adr")).unwrap();
    let adr = adr.map(|e| format!("docs/adr/{}", e.unwrap().file_name().to_str().unwrap()));
    let mut files: Vec<String> = adr.collect();
    let others = [
        "README",
        "CONTRIBUTING",
        "docs/architecture",
        "docs/errors",
        "docs/operations",
        "docs/performance",
    ];
    files.extend(others.map(|name| format!("{name}.md")));
    for file in files {
        let text = std::fs::read_to_string(root.join(&file)).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") {
                continue;
            }
            let (path, heading) = link.split_once('#').unwrap_or((link, ""));
            let to = root.join(&file).parent().unwrap().join(path);
            let to = if path.is_empty() { root.join(&file) } else { to };
            assert!(to.exists(), "{file} links to {link}, which is not there");
            if !heading.is_empty() {
                let there = anchors(&std::fs::read_to_string(&to).unwrap());
                assert!(there.contains(&heading.into()), "{file}: {link} has no such heading");
            }
        }
    }
}

#[test]
fn the_sections_that_messages_point_to_are_there() {
    let there = anchors(include_str!("../docs/operations.md"));
    for section in ["grants", "host-hygiene", "damaged-records"] {
        assert!(there.iter().any(|a| a == section), "docs/operations.md lacks {section}");
    }
    for reason in Reason::ALL {
        if let Some((_, section)) = reason.remedy().split_once("docs/operations.md, ") {
            let section = anchor(section.trim_end_matches('.'));
            assert!(there.contains(&section), "{}: no section {section}", reason.code());
        }
    }
}

/// The table of scenarios names tests that are there.
#[test]
fn every_scenario_has_the_tests_that_it_names() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = include_str!("../docs/scenarios.md");
    let named: Vec<&str> =
        text.split('`').skip(1).step_by(2).filter(|t| t.contains("::")).collect();
    assert!(named.len() > 40, "{}", named.len());
    for test in named {
        let (module, name) = test.split_once("::").unwrap();
        let file = match module.strip_prefix("unit/") {
            Some(module) => root.join(format!("src/connector/{module}.rs")),
            None => root.join(format!("tests/{module}.rs")),
        };
        let source = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{test}: {e}"));
        assert!(source.contains(&format!("fn {name}(")), "{test} is not in {}", file.display());
    }
}
