//! Metrics in Prometheus' text form, served over HTTP where `metrics_listen` says.
//!
//! | metric | kind, labels | what |
//! |---|---|---|
//! | `lunplug_step_seconds` | histogram; `step`, `result` (`ok`, `error`) | how long each step took |
//! | `lunplug_failures_total` | counter; `way` (`attach`, `detach`), `reason` | attempts that did not succeed |
//!
//! No label has a volume's or a VM's name: their number has no bound.

use std::net::SocketAddr;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

/// Upper bounds in seconds, from a write to /run to a login that ran into its deadline.
const BUCKETS: &[f64] = &[0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 120.0];

/// The metrics cannot be served.
#[derive(Debug, thiserror::Error)]
#[error(
    "metrics cannot be served at {at}: set metrics_listen to an address that is free, or leave it empty"
)]
pub struct MetricsError {
    at: SocketAddr,
    #[source]
    source: BuildError,
}

/// Serves the metrics of this process from now on; within a runtime, once.
pub fn serve(at: SocketAddr) -> Result<(), MetricsError> {
    let installed = builder().and_then(|b| b.with_http_listener(at).install());
    installed.map_err(|source| MetricsError { at, source })?;
    metrics::describe_histogram!(
        "lunplug_step_seconds",
        metrics::Unit::Seconds,
        "How long each step of an attach or detach took"
    );
    metrics::describe_counter!(
        "lunplug_failures_total",
        "Attempts to attach or detach a volume that did not succeed, by reason"
    );
    Ok(())
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    let step = Matcher::Full("lunplug_step_seconds".into());
    PrometheusBuilder::new().set_buckets_for_metric(step, BUCKETS)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::host::sim::Faults;
    use crate::reason::Reason;
    use crate::step::{Step, Tracker};
    use crate::vm::failure::Failure;

    #[test]
    fn steps_and_failures_are_told() {
        let recorder = builder().unwrap().build_recorder();
        let tracker = Tracker::new(Arc::new(Faults::default()));
        metrics::with_local_recorder(&recorder, || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            runtime.block_on(async {
                tracker.run(Step::Login, async { Ok::<_, ()>(()) }).await.unwrap();
                tracker.run(Step::Login, async { Err::<(), _>(()) }).await.unwrap_err();
            });
            Failure::new(Reason::PodGone, "").count("attach");
        });
        let text = recorder.handle().render();
        for line in [
            "lunplug_step_seconds_count{step=\"login\",result=\"ok\"} 1",
            "lunplug_step_seconds_count{step=\"login\",result=\"error\"} 1",
            "lunplug_step_seconds_bucket{step=\"login\",result=\"ok\",le=\"120\"} 1",
            "lunplug_failures_total{way=\"attach\",reason=\"POD_GONE\"} 1",
        ] {
            assert!(text.contains(line), "{line}\n{text}");
        }
    }
}
