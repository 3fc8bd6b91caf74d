# Counts test cases in what GoogleTest programs printed, one block for each program as CTest logs it:
#   1/2 Testing: NAME ... [  PASSED  ] 3 tests. ... Test Passed.
# A program that ends badly without a failed case (a crash, a timeout) counts as one failure. -v status=N: the runner's
# exit status. Leaves with 1 where anything failed.
function close_program() {
  if (name != "" && !good && cases_failed == 0) {
    print "failed: " name " did not run to its end"
    cases_failed = 1
  }
  if (good && cases_passed + cases_failed + cases_skipped == 0) cases_passed = 1  # no GoogleTest program
  passed += cases_passed
  failed += cases_failed
  skipped += cases_skipped
  good = cases_passed = cases_failed = cases_skipped = 0
}
/^[0-9]+\/[0-9]+ Testing: / { close_program(); name = $3 }
/^\[  PASSED  \] [0-9]+ test/ { cases_passed = $4 }
/^\[  FAILED  \] [0-9]+ test/ { cases_failed = $4 }
/^\[  SKIPPED \] [0-9]+ test/ { cases_skipped = $4 }
/^Test Passed\.$/ { good = 1 }
after_skip { reasons[$0]++ }
{ after_skip = /: Skipped$/ }
END {
  close_program()
  if (status != 0 && failed == 0) failed = 1
  for (reason in reasons) print "skipped " reasons[reason] ": " reason
  print passed + 0 " passed, " failed + 0 " failed, " skipped + 0 " skipped"
  exit failed > 0
}
