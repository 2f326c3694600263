#!/bin/bash
# Starts a run, and starts it again for as long as it ends because it was asked to stop:
#     bash again.sh --config=ncfm --workdir=runs/digits
# On a TPU VM or any machine of one's own; LIMIT, such as 11h, sends SIGTERM after that time, for a
# notebook session of twelve hours (Kaggle), and then nothing is started again.
while true; do
    timeout --foreground --signal=TERM "${LIMIT:-0}" jaxdistill "$@"
    code=$?
    # 124: the time was over, and the run has saved what it had.
    if [ $code -eq 124 ]; then
        exit 75
    fi
    if [ $code -ne 75 ]; then
        exit $code
    fi
done
