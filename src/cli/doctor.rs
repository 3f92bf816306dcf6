//! `lunplug doctor`: looks at the node itself, not by way of lunplugd.

use std::io;
use std::path::PathBuf;

use super::Screen;
use super::failure::{Exit, Failure};
use super::output::{self, Format};
use crate::config::Layers;
use crate::doctor::{self, Finding, Severity};
use crate::host::survey;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// lunplugd's configuration [default: /etc/lunplug/lunplugd.toml, if there].
    #[arg(long, env = "LUNPLUG_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Show what is as it should be, too.
    #[arg(short, long)]
    all: bool,
}

pub(super) async fn run(
    args: Args,
    format: Format,
    screen: &mut Screen<'_>,
) -> Result<(), Failure> {
    let loaded = Layers::from_system(args.config.as_deref(), Vec::new()).and_then(Layers::load);
    let config = loaded.map_err(|error| Failure::config(&error))?.config;
    let findings = doctor::examine(&survey::look(config).await);
    report(&findings, args.all, format, screen)?;
    match count(&findings, Severity::Problem) {
        0 => Ok(()),
        1 => Err(Failure::plain(Exit::Problems, "1 problem found")),
        n => Err(Failure::plain(Exit::Problems, format!("{n} problems found"))),
    }
}

fn count(findings: &[Finding], severity: Severity) -> usize {
    findings.iter().filter(|f| f.severity == severity).count()
}

fn report(
    findings: &[Finding],
    all: bool,
    format: Format,
    screen: &mut Screen<'_>,
) -> io::Result<()> {
    let mut shown: Vec<&Finding> =
        findings.iter().filter(|f| all || f.severity != Severity::Fine).collect();
    // The worst first.
    shown.sort_by_key(|f| std::cmp::Reverse(f.severity));
    if format != Format::Table {
        return output::document(format, &shown, screen.out);
    }
    for finding in &shown {
        let word = match finding.severity {
            Severity::Fine => "fine",
            Severity::Warning => "warning",
            Severity::Problem => "problem",
        };
        writeln!(screen.out, "{word}: {}: {}", finding.check, output::clean(&finding.what))?;
        if !finding.what_to_do.is_empty() {
            writeln!(screen.out, "  what to do: {}", output::clean(&finding.what_to_do))?;
        }
    }
    let warnings = count(findings, Severity::Warning);
    if count(findings, Severity::Problem) == 0 {
        match warnings {
            0 => writeln!(screen.out, "no problems found")?,
            n => writeln!(screen.out, "no problems found, warnings: {n}")?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(check: &'static str, severity: Severity) -> Finding {
        let what_to_do = if severity == Severity::Fine { "" } else { "Do it." };
        Finding { check, severity, what: "it is so".into(), what_to_do: what_to_do.into() }
    }

    fn shown(findings: &[Finding], all: bool, format: Format) -> String {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut screen = Screen { out: &mut out, err: &mut err, live: false };
        report(findings, all, format, &mut screen).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn the_worst_comes_first_and_what_is_fine_is_left_out() {
        let findings = [
            finding("a", Severity::Fine),
            finding("b", Severity::Warning),
            finding("c", Severity::Problem),
        ];
        assert_eq!(
            shown(&findings, false, Format::Table),
            "problem: c: it is so\n  what to do: Do it.\nwarning: b: it is so\n  what to do: Do it.\n"
        );
        assert!(shown(&findings, true, Format::Table).ends_with("fine: a: it is so\n"));
        assert!(shown(&findings[..1], false, Format::Table).starts_with("no problems found\n"));
        assert!(shown(&findings[..2], false, Format::Table).ends_with("warnings: 1\n"));
        let json: serde_json::Value =
            serde_json::from_str(&shown(&findings, false, Format::Json)).unwrap();
        assert_eq!(json[0]["check"], "c");
        assert_eq!(json[0]["severity"], "problem");
    }
}
