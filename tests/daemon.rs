//! lunplugd's start and end, and its configuration through the real binary.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod common;

use std::process::{Command, Output};
use std::sync::Arc;

use common::{Facade, Memory};
use lunplug::api::v1;
use lunplug::config::Config;
use lunplug::daemon;

fn lunplugd(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_lunplugd"))
        .env_clear()
        .envs(environment.iter().copied())
        .args(arguments)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.into()).unwrap()
}

#[test]
fn the_binary_shows_the_configuration_in_force() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "node_name = 'file'\n[log]\nlevel = 'warn'\nformat = 'json'\n")
        .unwrap();
    let path = file.path().to_str().unwrap();
    let output = lunplugd(
        &["--check-config", "--vm", "ns/a", "--set", "limits.max_vms=3", "--log-level", "debug"],
        &[
            ("LUNPLUG_CONFIG", path),
            ("LUNPLUG_NODE_NAME", "environment"),
            ("LUNPLUG_LOG_LEVEL", "error"),
            ("LUNPLUG_PORT", "tcp://10.0.0.1:1"),
        ],
    );
    assert!(output.status.success(), "{}", text(&output.stderr));
    let config: Config = toml::from_str(&text(&output.stdout)).unwrap();
    assert_eq!(config.node_name, "environment");
    assert_eq!(config.log.level, "debug");
    assert_eq!(config.log.format, lunplug::config::LogFormat::Json);
    assert_eq!(config.limits.max_vms, 3);
    assert_eq!(config.socket.to_str(), Some("/run/lunplug/ns_a.sock"));
    assert!(text(&output.stderr).contains("LUNPLUG_PORT names no configuration key"));
}

#[test]
fn a_wrong_configuration_is_one_line_and_its_own_exit_code() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "\nsockte = '/x'\n").unwrap();
    let path = file.path().to_str().unwrap();
    for (arguments, words) in [
        (vec!["--config", path], format!("{path}:2: unknown field `sockte`")),
        (
            vec!["--config", "/nonexistent"],
            "cannot read configuration /nonexistent: No such".into(),
        ),
        (vec!["--set", "log.level=loud=x"], "log.level: log level \"loud=x\" is malformed".into()),
        (vec!["--log-format", "xml"], "--log-format: unknown variant `xml`".into()),
    ] {
        let output = lunplugd(&[&arguments[..], &["--check-config"]].concat(), &[]);
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(78), "{err}");
        assert_eq!(err.lines().count(), 1, "{err}");
        assert!(err.contains(&words), "{err}");
    }
}

#[tokio::test]
async fn it_serves_until_told_to_stop_and_leaves_no_socket() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config { run_dir: dir.path().join("run"), ..Config::default() };
    config.resolve(None, "node-1");
    let (socket, listener) = daemon::bind(&config).unwrap();
    assert!(daemon::bind(&config).is_err(), "one daemon only");
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn({
        let config = config.clone();
        let volumes = Arc::new(Facade(Memory::new()));
        async move {
            let stopped = async { drop(stopped.await) };
            daemon::serve(&config, volumes, listener, stopped).await
        }
    });
    let channel = common::channel(&config.socket).await;
    let mut client = v1::lunplug_service_client::LunplugServiceClient::new(channel);
    client.get_node(v1::GetNodeRequest {}).await.unwrap();
    stop.send(()).unwrap();
    serving.await.unwrap().unwrap();
    drop(socket);
    assert!(!config.socket.exists());
}

#[test]
fn faults_are_read_from_yaml_and_json() {
    use lunplug::host::sim::FaultAction;
    let file = tempfile::NamedTempFile::new().unwrap();
    let yaml = "- point: libvirt.attach\n  times: 1\n  action: {fail: 'no'}\n- point: sysfs.write\n  detail: scan\n  action: hang\n";
    let json = r#"[{"point": "libvirt.attach", "times": 1, "action": {"fail": "no"}},
        {"point": "sysfs.write", "detail": "scan", "action": "hang"}]"#;
    for text in [yaml, json] {
        std::fs::write(file.path(), text).unwrap();
        let faults = daemon::read_faults(file.path()).unwrap();
        assert_eq!(faults[0].action, FaultAction::Fail("no".into()));
        assert_eq!((faults[1].detail.as_str(), &faults[1].action), ("scan", &FaultAction::Hang));
    }
    std::fs::write(file.path(), "- point: x\n  action: explode\n").unwrap();
    let error = daemon::read_faults(file.path()).unwrap_err();
    assert!(std::error::Error::source(&error).unwrap().to_string().contains("explode"));
}
