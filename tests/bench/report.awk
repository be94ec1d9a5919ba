# The results of tests/bench/run as Markdown; or, with -v plot=1, the cost of a
# delivery by clients (rows) and servers (columns) for gnuplot.
# `order` has the servers' names.
BEGIN {
  FS = "\t"
  server_count = split(order, servers, " ")
}

{
  if (!($1 in seen_scenario)) scenarios[++scenario_count] = $1
  seen_scenario[$1]
  if ($3 > rounds) rounds = $3
  if ($1 == "idle") { cost[$1, $2, $3] = $4; next }
  cost[$1, $2, $3] = $5 / $4 / 1000  # us for a delivery
  late[$1, $2, $3] = $7 / 1000000    # ms
}

# The median of table[scenario, server, *], or ""; and the lowest and the highest.
function median(table, scenario, server,   n, i, k, values, swap) {
  for (i = 1; i <= rounds; ++i)
    if ((scenario, server, i) in table) {
      values[++n] = table[scenario, server, i]
      for (k = n; k > 1 && values[k] < values[k - 1]; --k) {
        swap = values[k]; values[k] = values[k - 1]; values[k - 1] = swap
      }
    }
  lowest = values[1]; highest = values[n]
  return n == 0 ? "" : values[int((n + 1) / 2)]
}

# The best peer by its median, and the median of rat's ratios to it, round by
# round; and which were the lowest and the highest one.
function compare(table, scenario,   i, value, best, ratio) {
  best_peer = ""
  for (i = 1; i <= server_count; ++i) {
    value = servers[i] == "rat" ? "" : median(table, scenario, servers[i])
    if (value != "" && (best_peer == "" || value < best)) {
      best_peer = servers[i]
      best = value
    }
  }
  for (i = 1; i <= rounds; ++i)
    if ((scenario, "rat", i) in table && (scenario, best_peer, i) in table)
      ratio["x", "x", i] = table[scenario, "rat", i] / \
                           table[scenario, best_peer, i]
  return median(ratio, "x", "x")
}

function print_table(title, table,   i, k, value, best) {
  printf "\n%s\n\n|  |", title
  for (i = 1; i <= server_count; ++i) printf " %s |", servers[i]
  printf " rat beside the best of the others |\n|---|---|"
  for (i = 1; i <= server_count; ++i) printf "---|"
  print ""
  for (k = 1; k <= scenario_count; ++k) {
    value = compare(table, scenarios[k])
    best = value == "" ? "-" : \
           sprintf("%.2f of %s, %.2f to %.2f", value, best_peer, lowest, highest)
    if (best_peer == "" && median(table, scenarios[k], "rat") == "") continue
    printf "| %s |", scenarios[k]
    for (i = 1; i <= server_count; ++i) {
      value = median(table, scenarios[k], servers[i])
      printf value == "" ? " - |" : value < 100 ? " %.3g |" : " %.0f |", value
    }
    printf " %s |\n", best
  }
}

function print_noise(   i, k, value, spread, n, sum) {
  for (k = 1; k <= scenario_count; ++k)
    for (i = 1; i <= server_count; ++i) {
      value = median(cost, scenarios[k], servers[i])
      if (value == "" || scenarios[k] == "idle") continue
      sum += (highest - lowest) / value
      ++n
    }
  if (n > 0)
    printf "\nNoise: from the lowest to the highest round of one server it " \
           "is %.0f %% on average.\n", 100 * sum / n
}

END {
  if (plot) {
    printf "clients"
    for (i = 1; i <= server_count; ++i) printf "\t%s", servers[i]
    for (k = 1; k <= scenario_count; ++k) {
      if (scenarios[k] !~ /^fan-/) continue
      printf "\n%d", substr(scenarios[k], 5)
      for (i = 1; i <= server_count; ++i) {
        value = median(cost, scenarios[k], servers[i])
        printf "\t%s", value == "" ? "?" : value
      }
    }
    print ""
    exit
  }
  print_table("Processor time of the server, us for a delivery " \
              "(idle: bytes of memory for a client), medians:", cost)
  print_table("Latency of a delivery, p99, ms, medians:", late)
  print_noise()
}
